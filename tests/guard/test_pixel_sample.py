"""Which pixels the guard samples, and what it knows of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apl_lightning.guard import PixelSample


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the second opinion of a sample is learnt from."""
    found: dict[str, Any] = {}

    def opinion(features: Tensor, folds: Any, labels: Tensor, num_classes: int) -> Tensor:
        found.update(features=features, folds=folds)
        return torch.zeros(len(features), num_classes)

    monkeypatch.setattr("apl_lightning.guard.pixel_sample.second_opinion", opinion)
    return found


@pytest.mark.parametrize(
    ("cases", "folds", "positions"),
    [
        ([["a"], ["b"]], [0, 1], [-1, -1]),
        ([["a", "a", "a", "b"]], [0, 0, 0, 1], [-1, 0, 1, -1]),
        ([["a"] * 4], [0, 0, 1, 1], [-1, -1 / 3, 1 / 3, 1]),
        ([["", "", ""]], [0, 0, 1], [-1, -1, -1]),
    ],
)
def test_patients_are_in_one_fold(
    learnt: dict[str, Any], cases: list[list[str]], folds: Any, positions: list[float]
) -> None:
    names = [name for group in cases for name in group]
    images, labels = torch.rand(len(names), 1, 2, 2), torch.zeros(len(names), 2, 2, dtype=torch.long)
    sample = PixelSample(len(names))
    classes = sample.look(range(len(names)), names, images, labels)
    sample.gains(classes, classes, 2)
    assert learnt["folds"].view(len(names), 4).tolist() == [[fold] * 4 for fold in folds]
    torch.testing.assert_close(learnt["features"][:, -1].view(len(names), 4)[:, 0], torch.tensor(positions).float())


def test_pixels_differ_between_images() -> None:
    numbers = torch.arange(100 * 100).view(1, 100, 100).expand(2, -1, -1)
    classes = PixelSample(2**12).look([0, 1], ["", ""], torch.rand(2, 1, 100, 100), numbers)
    assert not torch.equal(classes[0], classes[1])


@pytest.mark.parametrize(("length", "count"), [(2**20, 16), (64, 4096)])
def test_number_of_sampled_pixels(length: int, count: int) -> None:
    """2^18 in all, and at least 16 of an image."""
    image, labels = torch.rand(1, 1, 256, 256), torch.zeros(1, 256, 256).long()
    assert len(PixelSample(length).look([0], [""], image, labels)[0]) == count

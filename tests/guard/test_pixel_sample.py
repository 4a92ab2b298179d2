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
        (["a", "b"], [0, 1, 2, 3, 4, 5, 6, 7], [-1, -1]),
        (["a", "a", "a", "b"], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7], [-1, 0, 1, -1]),
        (["a", "b", "a", "b"], [0, 0, 1, 1, 4, 4, 5, 5, 2, 2, 3, 3, 6, 6, 7, 7], [-1, -1, 1, 1]),
        (["", "", ""], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], [-1, -1, -1]),
        (["a", "a"], [0, 1, 2, 3, 4, 5, 6, 7], [-1, 1]),
    ],
)
def test_folds_and_positions(learnt: dict[str, Any], cases: list[str], folds: Any, positions: list[float]) -> None:
    """Eighths of the pixels, patient after patient; the position of an image is that of a slice of its case."""
    images, labels = torch.rand(len(cases), 1, 2, 2), torch.zeros(len(cases), 2, 2, dtype=torch.long)
    sample = PixelSample(len(cases))
    classes = sample.look(range(len(cases)), cases, images, labels)
    sample.gains(classes, classes, 2)
    assert learnt["folds"].tolist() == folds
    torch.testing.assert_close(learnt["features"][:, -1].view(len(cases), 4)[:, 0], torch.tensor(positions).float())


@pytest.mark.parametrize("case", ["a", ""])
@pytest.mark.parametrize("slices", [slice(17, None), slice(17, 20)])
def test_an_organ_in_some_slices_of_one_patient(case: str, slices: slice) -> None:
    """The network misses half of its pixels, anywhere; then it finds all of them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(32, 32, 32, dtype=torch.long)
    truth[slices, 8:24, 8:24] = 1
    images = (truth + 0.1 * torch.randn(truth.shape, generator=generator))[:, None]
    missed = truth * (torch.rand(truth.shape, generator=generator) < 0.5)
    sample = PixelSample(32)
    before, after = (sample.look(range(32), [case] * 32, images, labels) for labels in (missed, truth))
    (gain,) = sample.gains(before, after, 2)
    assert gain == pytest.approx(1 - 2 * 0.5 / 1.5, abs=0.05)  # the true one


def test_pixels_differ_between_images() -> None:
    numbers = torch.arange(100 * 100).view(1, 100, 100).expand(2, -1, -1)
    classes = PixelSample(2**12).look([0, 1], ["", ""], torch.rand(2, 1, 100, 100), numbers)
    assert not torch.equal(classes[0], classes[1])


@pytest.mark.parametrize(("length", "count"), [(2**20, 16), (64, 4096)])
def test_number_of_sampled_pixels(length: int, count: int) -> None:
    """2^18 in all, and at least 16 of an image."""
    image, labels = torch.rand(1, 1, 256, 256), torch.zeros(1, 256, 256).long()
    assert len(PixelSample(length).look([0], [""], image, labels)[0]) == count

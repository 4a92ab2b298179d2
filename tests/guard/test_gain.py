"""The estimated gain against naive implementations and known gains; features against SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from apl_lightning.guard import PixelSample, estimate_gain, second_opinion
from apl_lightning.guard.pixel_features import pixel_features


def naive_gain(opinion: list[list[float]], before: list[int], after: list[int], c: int) -> float:
    """The equation of `estimate_gain` for class c, pixel by pixel."""
    right = [
        a if a == b else (b if scores[b] > scores[a] else a)
        for scores, a, b in zip(opinion, before, after, strict=True)
    ]

    def dice(predicted: list[int]) -> float:
        both = sum(p == r == c for p, r in zip(predicted, right, strict=True))
        sizes = predicted.count(c) + right.count(c)
        return 2 * both / sizes if sizes else 0.0

    return dice(after) - dice(before)


def test_gain_of_known_opinions() -> None:
    opinion, before, after = torch.randn(200, 4), torch.randint(3, (200,)), torch.randint(3, (200,))
    found = estimate_gain(opinion, before, after).tolist()
    assert found[:2] == pytest.approx(
        [naive_gain(opinion.tolist(), before.tolist(), after.tolist(), c) for c in (1, 2)], abs=1e-6
    )
    assert math.isnan(found[2]), "no network predicts class 3"
    assert estimate_gain(opinion, before, before).tolist()[:2] == [0, 0]


def scene(patients: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images with a bright disc and a dark one on noise, and the truth: features, folds, truth, and the cases."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    images, truth = [], []
    for _ in range(patients):
        y, x = (torch.rand(2, generator=generator) * 8 + 16).tolist()
        label = ((rows - y) ** 2 + (columns - x) ** 2 < 64).long()
        label[(rows - y - 12) ** 2 + (columns - x - 10) ** 2 < 25] = 2
        noise = 0.15 * torch.randn(48, 48, generator=generator)
        images.append(0.5 + 0.3 * (label == 1) - 0.3 * (label == 2) + noise)
        truth.append(label)
    places = torch.arange(48 * 48).expand(patients, -1)
    features = pixel_features(torch.stack(images)[:, None], places).flatten(0, 1)
    folds = (torch.arange(patients) % 2).repeat_interleave(48 * 48)
    return features, folds, torch.stack(truth), places


def dice(predicted: Tensor, truth: Tensor, c: int) -> float:
    return float(2 * ((predicted == c) & (truth == c)).sum() / ((predicted == c).sum() + (truth == c).sum()))


def erode(labels: Tensor, times: int) -> Tensor:
    mask = np.stack([ndimage.binary_erosion(label > 0, iterations=times) for label in labels.numpy()])
    return labels * torch.from_numpy(mask)


def dilate(labels: Tensor, times: int) -> Tensor:
    grown = np.stack([ndimage.grey_dilation(label, size=1 + 2 * times) for label in labels.numpy()])
    return torch.from_numpy(grown)


def missing(labels: Tensor) -> Tensor:
    """The organs are lost in every third patient, as by a network that works for the others."""
    return labels * (torch.arange(len(labels)) % 3 > 0).long()[:, None, None]


def noisy(labels: Tensor) -> Tensor:
    flipped = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.05
    return torch.where(flipped, torch.randint(3, labels.shape, generator=torch.Generator().manual_seed(2)), labels)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda truth: noisy(truth), lambda truth: truth),
        (lambda truth: missing(truth), lambda truth: truth),
        (lambda truth: noisy(truth), lambda truth: erode(truth, 2)),
        (lambda truth: noisy(truth), lambda truth: dilate(truth, 2)),
        (lambda truth: noisy(truth), lambda truth: torch.zeros_like(truth)),
        (lambda truth: noisy(truth), lambda truth: noisy(truth).where(truth == 1, 0)),
    ],
)
def test_estimate_tells_gain_from_harm(before: Any, after: Any) -> None:
    """Networks that miss, erode, spread or lose organs; the estimate is near the true gain of each class."""
    features, folds, truth, _ = scene()
    first, second = before(truth), after(truth)
    opinion = second_opinion(features, folds, first.flatten(), 3)
    found = estimate_gain(opinion, first.flatten(), second.flatten())
    for c in (1, 2):
        true = dice(second, truth, c) - dice(first, truth, c)
        assert float(found[c - 1]) == pytest.approx(true, abs=0.15)
        assert abs(true) < 0.05 or float(found[c - 1]) * true > 0


def test_opinion_on_a_class_that_the_other_fold_lacks() -> None:
    """It cannot be told from anything, so the network that says it is not believed."""
    features, folds = torch.rand(400, 1), torch.arange(400) % 2
    labels = ((features[:, 0] > 0.5) & (folds == 1)).long()
    opinion = second_opinion(features, folds, labels, 2)
    assert torch.equal(opinion[folds == 1, 1], torch.full((200,), -torch.inf))
    assert opinion[folds == 0].isfinite().all()


def test_opinion_leaves_the_random_numbers_alone() -> None:
    features, folds = torch.rand(400, 1), torch.arange(400) % 2
    state = torch.random.get_rng_state()
    first = second_opinion(features, folds, folds, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, second_opinion(features, folds, folds, 2))


@pytest.mark.parametrize("size", [(20, 31), (14, 12, 10)])
def test_features(size: tuple[int, ...]) -> None:
    images = torch.rand(2, 2, *size)
    places = torch.stack([torch.randperm(math.prod(size))[:50] for _ in range(2)])
    found = pixel_features(images, places)
    assert found.shape == (2, 50, 12 + len(size))
    for image, of_image, where in zip(images.double().numpy(), found, places, strict=True):
        index = np.unravel_index(where.numpy(), size)
        for channel in range(2):
            smooth = {
                scale: ndimage.gaussian_filter(image[channel], scale, mode="nearest", truncate=3)
                for scale in (1, 2, 4, 8)
            }
            square = ndimage.gaussian_filter(image[channel] ** 2, 2, mode="nearest", truncate=3)
            maps = [image[channel], *smooth.values(), np.sqrt(np.maximum(square - smooth[2] ** 2, 0))]
            for place, expected in enumerate(maps):
                values = of_image[:, channel + 2 * place].numpy()
                np.testing.assert_allclose(values, expected[index], atol=2e-3 if place == 5 else 1e-5)
        for axis, extent in enumerate(size):
            np.testing.assert_allclose(of_image[:, 12 + axis].numpy(), 2 * index[axis] / (extent - 1) - 1, atol=1e-6)


def test_sample_takes_the_same_pixels_in_any_batches() -> None:
    images, labels = torch.rand(4, 1, 9, 9), torch.randint(3, (4, 9, 9))
    cases = ["a", "a", "b", "b"]
    whole, parts = PixelSample(4), PixelSample(4)
    expected = whole.look([0, 1, 2, 3], cases, images, labels)
    found = parts.look([3], cases[3:], images[3:], labels[3:]) | parts.look(
        [0, 1, 2], cases[:3], images[:3], labels[:3]
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[index], found[index]) for index in found)
    other = {index: (classes + 1) % 3 for index, classes in found.items()}
    assert whole.gains(expected, other, 3) == parts.gains(found, other, 3)


@pytest.mark.parametrize("cases", [["a"] * 4, ["", "", "", ""], ["a", "b", "b", "c"]])
def test_sample_needs_no_cases(cases: list[str]) -> None:
    features, _, truth, _ = scene(4)
    images = features[:, :1].view(4, 1, 48, 48)
    sample = PixelSample(4)
    before = sample.look(range(4), cases, images, noisy(truth))
    after = sample.look(range(4), cases, images, truth)
    assert min(sample.gains(before, after, 3)) > 0.05


def test_sample_of_a_single_volume() -> None:
    """One image: its pixels make the folds."""
    features, _, truth, _ = scene(4)
    images = features[:, :1].view(1, 1, 4, 48, 48)
    sample = PixelSample(1)
    before = sample.look([0], [""], images, noisy(truth)[None])
    assert min(sample.gains(before, sample.look([0], [""], images, truth[None]), 3)) > 0.05


def test_neither_network_is_believed() -> None:
    opinion = torch.full((4, 3), -torch.inf)
    opinion[:, 0] = 0.0
    before, after = torch.tensor([1, 1, 0, 0]), torch.tensor([2, 2, 0, 0])
    # Both logits are -inf, so the first network counts as right: class 1 falls from 1 to 0, class 2 stays 0.
    assert estimate_gain(opinion, before, after).tolist() == [-1, 0]


@pytest.mark.parametrize("left", [0, 4])
def test_fading_of_a_class_that_the_other_fold_lacks_is_no_gain(left: int) -> None:
    """An organ of the images of one fold alone is unknown to the other one: what is lost of it counts as lost."""
    features, folds = torch.rand(400, 1), torch.arange(400) % 2
    before = ((features[:, 0] > 0.5) & (folds == 1)).long()
    after = before * (torch.arange(400) % 8 < left)  # half of it, or nothing
    gain = estimate_gain(second_opinion(features, folds, before, 2), before, after).item()
    overlap = int((after * before).sum())
    assert gain == pytest.approx(2 * overlap / int(before.sum() + after.sum()) - 1)
    assert gain < -0.2


def test_outliers_and_nan() -> None:
    intensity = torch.linspace(0, 1, 4000)[:, None].clone()
    folds, truth = torch.arange(4000) % 2, (intensity[:, 0] > 0.5).long()
    worse = truth * (torch.arange(4000) % 10 > 4)
    intensity[7] = 3e8  # one enormous pixel
    assert estimate_gain(second_opinion(intensity, folds, worse, 2), worse, truth).item() > 0.1
    intensity[8] = torch.nan
    intensity[7] = torch.inf
    assert estimate_gain(second_opinion(intensity, folds, worse, 2), worse, truth).item() > 0.1


@pytest.mark.parametrize(("count", "known"), [(19, False), (20, True)])
def test_fewest_pixels_of_a_class(count: int, known: bool) -> None:
    features, folds = torch.rand(400, 1), torch.arange(400) // 200
    labels = torch.zeros(400, dtype=torch.long)
    labels[:count] = 1  # in fold 0
    opinion = second_opinion(features, folds, labels, 2)
    assert bool(opinion[200:, 1].isfinite().all()) == known

"""Views against their own code, MONAI and torch; scores against torch's distributions."""

from __future__ import annotations

import math

import pytest
import torch
from monai.transforms import NormalizeIntensity, ScaleIntensityRangePercentiles
from torch import nn
from torch.distributions import Normal, kl_divergence

from apl_lightning.preflight import RunningStatistics, sureness
from apl_lightning.preflight.orientations import first_orientations, next_orientations
from apl_lightning.preflight.score import count_foreground
from apl_lightning.preflight.views import invert, rescale, resize, standardise, views_of

RANDOM = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("dimensions", "first", "all_of_them"), [(1, 1, 1), (2, 7, 7), (3, 12, 47)])
def test_orientations_are_all_different(dimensions: int, first: int, all_of_them: int) -> None:
    image = torch.rand(1, 1, *[3] * dimensions, generator=RANDOM)
    orientations = first_orientations(dimensions)
    assert len(orientations) == first
    orders = [one for one in orientations if one.axes != tuple(range(dimensions))] if dimensions == 3 else []
    orientations += [flipped for order in orders for flipped in next_orientations(order)]
    seen = {tuple(one(image).flatten().tolist()) for one in orientations}
    assert len(seen) == len(orientations) == all_of_them
    assert tuple(image.flatten().tolist()) not in seen


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_code_of_an_orientation_does_what_it_does(dimensions: int) -> None:
    image = torch.rand(2, *range(3, 3 + dimensions), generator=RANDOM)
    for first in first_orientations(dimensions):
        for one in [first, *next_orientations(first)]:
            assert torch.equal(eval(one.code, {"torch": torch, "image": image}), one(image)), one


def test_words_of_orientations() -> None:
    looks = {one.looks for one in first_orientations(2)}
    assert len(looks) == 7
    assert "rotated by 180 degrees" in looks
    assert "rotated by 90 degrees clockwise in the plane of the axes -3, -2" in {
        one.looks for first in first_orientations(3) for one in next_orientations(first)
    }


def test_intensities_as_in_monai() -> None:
    image = torch.randn(1, 40, 50, generator=RANDOM)
    expected = ScaleIntensityRangePercentiles(1, 99.5, -1, 1, clip=True)(image)
    assert torch.allclose(rescale(image[None], -1, 1)[0], torch.as_tensor(expected), atol=1e-5)
    assert torch.allclose(standardise(image[None])[0], torch.as_tensor(NormalizeIntensity()(image)), atol=1e-3)
    assert torch.allclose(invert(image[None])[0], image.max() + image.min() - image)


@pytest.mark.parametrize("size", [(64, 96), (16, 32, 24)])
def test_new_sizes_keep_powers_of_two(size: tuple[int, ...]) -> None:
    """Padded sizes are as divisible as the old ones, up to 32; a constant stays a constant."""
    images = torch.full((1, 1, *size), 3.0)
    for factor in (0.5, 2 / 3, 1.5, 2.0):
        resized = resize(images, factor)
        for new, old in zip(resized.shape[2:], size, strict=True):
            multiple = max(power for power in (1, 2, 4, 8, 16, 32) if old % power == 0)
            assert new % multiple == 0
            assert 0 <= new - factor * old < multiple
        assert torch.allclose(resized, torch.tensor(3.0))


def test_views_of_several_channels() -> None:
    kinds = [view.kind for view in views_of(torch.rand(1, 3, 8, 8))]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **{"orientation": 7, "inverted": 1, "range": 4, "size": 4},
        "channels": 5,
    }


def test_sureness_by_hand() -> None:
    """Of four pixels, one is background, one class 1 with 1/2, 1/4, 1/4, and one each class 1 and 2 for sure."""
    p = torch.tensor([[0.9, 0.05, 0.05], [0.25, 0.5, 0.25], [0, 1, 0], [0, 0, 1]]).clamp_min(1e-12)
    counted = count_foreground(p.log().T.view(1, 3, 2, 2))
    entropy = 1.5 * math.log(2)  # of the second pixel
    assert counted.flatten().tolist() == pytest.approx([entropy, 0, 2, 1, 4, 4], abs=1e-5)
    whole = math.log(3.004 / (entropy + 0.004))
    each = [math.log(2.002 / (entropy + 0.002)), math.log(1.002 / 0.002)]
    assert float(sureness(counted)) == pytest.approx(whole + sum(each) / 2, abs=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_likeness_is_the_divergence_of_torch(dimensions: int) -> None:
    norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
    network = nn.Sequential(norm(3), nn.ReLU(), norm(3)).eval()
    for layer in (network[0], network[2]):
        layer.running_mean.copy_(torch.rand(3, generator=RANDOM))
        layer.running_var.copy_(torch.rand(3, generator=RANDOM) + 0.5)
    batches = [torch.randn(2, 3, *[4] * dimensions, generator=RANDOM) for _ in range(2)]
    statistics = RunningStatistics(network)
    for _ in range(2):  # a second block starts from nothing
        with statistics.collecting(), torch.no_grad():
            for batch in batches:
                network(batch)
    expected = []
    for depth in (0, 2):
        with torch.no_grad():
            values = network[:depth](torch.cat(batches)).movedim(1, 0).flatten(1)
        seen = Normal(values.mean(dim=1), values.std(dim=1, unbiased=False))
        known = Normal(network[depth].running_mean, network[depth].running_var.sqrt())
        expected.append(-float(kl_divergence(seen, known).mean().log()))
    likeness = statistics.likeness()
    assert likeness is not None
    assert likeness.all == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert likeness.late == pytest.approx(expected[1], abs=1e-4)


def test_no_likeness_without_running_statistics() -> None:
    network = nn.Sequential(nn.InstanceNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False))
    statistics = RunningStatistics(network)
    with statistics.collecting():
        network(torch.rand(1, 1, 4, 4))
    assert statistics.likeness() is None

"""RandomAffine, the default joint transform."""

from __future__ import annotations

import math

import pytest
import torch

from apl_lightning import RandomAffine
from apl_lightning.data.alignment import check_alignment
from apl_lightning.data.joint_transforms import transform_jointly


def sample(*size: int) -> dict[str, torch.Tensor]:
    return {"image": torch.rand(2, *size), "pseudo_label": torch.randint(5, size), "weight": torch.rand(*size)}


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (8, 10, 6)])
def test_zero_ranges_give_the_identity(size: tuple[int, ...]) -> None:
    before = sample(*size)
    (after,) = transform_jointly(RandomAffine(0, 0, 0), before)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (12, 16, 10)])
def test_image_and_label_move_together(size: tuple[int, ...]) -> None:
    check_alignment(RandomAffine(), torch.rand(1, *size))
    before = sample(*size)
    (after,) = transform_jointly(RandomAffine(), before)
    assert not torch.equal(after["pseudo_label"], before["pseudo_label"])


def test_rotation_in_a_non_square_image_is_rigid() -> None:
    """The area, the radius and the distance of a disc from the image centre do not change."""
    rows, columns = torch.meshgrid(torch.arange(60) - 29.5, torch.arange(100) - 49.5, indexing="ij")
    disc = (((rows - 5) ** 2 + (columns - 12) ** 2) < 100).long()
    for _ in range(5):
        turned = RandomAffine(degrees=90, scale=0, shift=0)(
            {"image": disc[None].float(), "pseudo_label": disc[None], "weight": disc[None].float()}
        )["pseudo_label"][0]
        where = turned.nonzero().float()
        assert len(where) == pytest.approx(math.pi * 100, rel=0.03)
        distance = (where.mean(0) - torch.tensor([29.5, 49.5])).norm().item()
        assert distance == pytest.approx(13, abs=0.3)
        assert (where - where.mean(0)).norm(dim=1).max() < 10.8


def test_pixels_from_outside_the_image_have_weight_0() -> None:
    before = {"image": torch.ones(1, 20, 20), "pseudo_label": torch.ones(20, 20), "weight": torch.ones(20, 20)}
    for _ in range(5):
        (after,) = transform_jointly(RandomAffine(degrees=0, scale=0, shift=0.5), before)
        assert after["image"].min() == after["pseudo_label"].min() == 1
        seen = after["weight"] > 0
        columns, rows = seen.any(0).sum().item(), seen.any(1).sum().item()
        assert seen.sum() == columns * rows, "the shifted image is a rectangle"
        assert columns < 20 or rows < 20


def test_seeded() -> None:
    before = sample(16, 16)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(transform_jointly(RandomAffine(), before)[0]["image"])
    assert torch.equal(*draws)


def test_shifts_are_relative_to_the_image() -> None:
    """A pixel in the middle of 201 moves by at most 20 % of the image, in both directions, along each axis."""
    image = torch.zeros(1, 201, 101)
    image[0, 100, 50] = 1
    moves = []
    for _ in range(150):
        sample = {"image": image, "pseudo_label": image, "weight": torch.ones(1, 201, 101)}
        moved = RandomAffine(degrees=0, scale=0, shift=0.2)(sample)["image"][0]
        moves.append((moved.nonzero()[0] - torch.tensor([100, 50])).float())
    moves = torch.stack(moves)
    for axis, largest in enumerate((40.2, 20.2)):
        assert -largest - 1 <= moves[:, axis].min() < -0.8 * largest
        assert 0.8 * largest < moves[:, axis].max() <= largest + 1


def test_angles() -> None:
    """The direction of a bar tells the angle: up to 30 degrees either way."""
    rows, columns = torch.meshgrid(torch.arange(101.0) - 50, torch.arange(101.0) - 50, indexing="ij")
    bar = ((rows.abs() < 2) & (columns.abs() < 45)).float()[None]
    angles = []
    for _ in range(100):
        moved = RandomAffine(degrees=30, scale=0, shift=0)({"image": bar, "pseudo_label": bar, "weight": bar})["image"][
            0
        ]
        y, x = (moved.nonzero().float() - 50).T
        angles.append(math.degrees(0.5 * math.atan2(2 * float((x * y).mean()), float((x * x).mean() - (y * y).mean()))))
    assert -31 < min(angles) < -24
    assert 24 < max(angles) < 31


def test_sizes() -> None:
    """The area of a disc tells the size: up to 20 % larger or smaller."""
    rows, columns = torch.meshgrid(torch.arange(101.0) - 50, torch.arange(101.0) - 50, indexing="ij")
    disc = (rows**2 + columns**2 < 30**2).float()[None]
    sizes = []
    for _ in range(100):
        moved = RandomAffine(degrees=0, scale=0.2, shift=0)({"image": disc, "pseudo_label": disc, "weight": disc})[
            "image"
        ]
        sizes.append(math.sqrt(float(disc.sum() / moved.sum())))  # the map goes from output to input
    assert 0.79 < min(sizes) < 0.86
    assert 1.14 < max(sizes) < 1.21


@pytest.mark.parametrize(("size", "stays"), [((8, 40, 40), True), ((40, 8, 40), True), ((14, 40, 40), False)])
def test_thin_volumes_turn_in_their_plane(size: tuple[int, ...], stays: bool) -> None:
    """Each slice has its own value; out of the plane of a thin volume, 15 degrees would leave its slices."""
    thin = min(range(3), key=size.__getitem__)
    numbers = torch.arange(float(size[thin])).view([-1 if axis == thin else 1 for axis in range(3)])
    image = numbers.expand(size)[None].contiguous()
    moved = RandomAffine(scale=0, shift=0)({"image": image, "pseudo_label": image, "weight": torch.ones_like(image)})
    assert torch.equal(moved["image"], image) == stays
    assert not bool(moved["weight"].all()), "it turns in the plane"


@pytest.mark.parametrize("axis", range(3))
def test_volumes_turn_in_all_planes(axis: int) -> None:
    """A turn about its own axis leaves a rod; the two others move it along both other axes."""
    rod, index = torch.zeros(1, 21, 21, 21), [0, 10, 10, 10]
    index[axis + 1] = slice(None)  # type: ignore[call-overload]
    rod[tuple(index)] = 1
    spread = torch.zeros(3)
    for _ in range(20):
        moved = RandomAffine(degrees=30, scale=0, shift=0)({"image": rod, "pseudo_label": rod, "weight": rod})["image"]
        spread = spread.maximum(moved[0].nonzero().float().std(0))
    assert min(float(spread[other]) for other in range(3) if other != axis) > 1


def test_defaults() -> None:
    """Most of the gain depends on them."""
    assert RandomAffine() == RandomAffine(degrees=15.0, scale=0.15, shift=0.05)

"""The views of images that preflight tries: one change each, with its words and its cure."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import islice, permutations
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning.preflight.orientations import Orientation, first_orientations, next_orientations

Kind = Literal["as they are", "orientation", "inverted", "channels", "size", "range"]

SIZES = (0.5, 2 / 3, 1.5, 2.0)
MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}  # of interpolation, by spatial dimensions
RANGES = ((0, 1), (-1, 1), (0, 255))
_LARGEST_MULTIPLE = 32  # networks halve an image a few times, so a new size keeps the powers of two of the old one
_MOST_ORDERS = 23  # of up to four channels
_QUANTILES = (0.01, 0.995)
_MOST_VALUES = 2**20  # `torch.quantile` takes no more than 2^24
_LEAST_RANGE = 1e-6


class View(NamedTuple):
    """One change of images (B, C, *S), each independent of the others.

    Attributes:
        kind: What it changes.
        looks: How the images look to the network if this view suits it better, "Your images look ...".
        cure: What to change in the data set, mostly a line that makes this view of an `image` (C, *S).
        change: The function of images (B, C, *S).
        enlarges: By which factor each axis grows.
    """

    kind: Kind
    looks: str
    cure: str
    change: Callable[[Tensor], Tensor]
    enlarges: float = 1.0

    @property
    def moves_axes(self) -> bool:
        """Whether it changes the order of the axes and nothing else."""
        change = self.change
        return isinstance(change, Orientation) and change.axes != tuple(sorted(change.axes)) and not any(change.flips)


AS_THEY_ARE = View("as they are", "right", "nothing", lambda images: images)


def views_of(images: Tensor) -> list[View]:
    """The views of images like these, (B, C, *S); of a volume, those of the first step."""
    orientations = [orientation_view(one) for one in first_orientations(images.ndim - 2)]
    ranges = [*(_range(*limits) for limits in RANGES), _standard()]
    return [
        *orientations,
        _inverted(),
        *ranges,
        *(_size(factor, images.ndim - 2) for factor in SIZES),
        *_channel_orders(images.shape[1]),
    ]


def next_views(order: View) -> list[View]:
    """The views of a volume that follow the best order of its axes."""
    assert isinstance(order.change, Orientation)
    return [orientation_view(one) for one in next_orientations(order.change)]


def orientation_view(orientation: Orientation) -> View:
    """The view that turns images."""
    cure = f"`image = {orientation.code}`, or MONAI's `Orientation` with the axes of the images it was trained on"
    return View("orientation", orientation.looks, cure, orientation)


def invert(images: Tensor) -> Tensor:
    """Exchange dark and bright between the smallest and the largest value of each image and channel."""
    low, high = (extreme(images.flatten(2), dim=2) for extreme in (torch.amin, torch.amax))
    return (low + high).view(*images.shape[:2], *[1] * (images.ndim - 2)) - images


def resize(images: Tensor, factor: float) -> Tensor:
    """Resize images by a factor, and pad them at their border to a size that the network takes as it takes theirs.

    Enlarged images are sharpened: the network knows none so blurred.
    """
    size = [max(1, round(factor * extent)) for extent in images.shape[2:]]
    mode = MODES[images.ndim - 2]
    resized = F.interpolate(images, size=size, mode=mode, antialias=images.ndim == 4, align_corners=False)
    if factor > 1:
        resized = 2 * resized - _mean(resized, 3)
    missing = [_rounded(new, old) - new for new, old in zip(size, images.shape[2:], strict=True)]
    return F.pad(resized, [n for m in reversed(missing) for n in (m // 2, m - m // 2)], mode="replicate")


def _mean(images: Tensor, width: int) -> Tensor:
    """The means of neighbouring pixels, with a border that goes on."""
    pool = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[images.ndim]
    border = [(width - 1) // 2, width // 2] * (images.ndim - 2)
    means: Tensor = pool(F.pad(images, border, mode="replicate"), width, stride=1)
    return means


def cut(size: int, most: int) -> int:
    """At most `most` of an axis, with the powers of two of its size."""
    multiple = min(size & -size, _LARGEST_MULTIPLE)
    return size if size <= most else max(multiple, most // multiple * multiple)


def _rounded(size: int, like: int) -> int:
    multiple = min(like & -like, _LARGEST_MULTIPLE)
    return -(-size // multiple) * multiple


def _size(factor: float, dimensions: int) -> View:
    looks = f"{factor:.2g} times too small" if factor > 1 else f"{1 / factor:.2g} times too large"
    options = f"scale_factor={Fraction(factor).limit_denominator(9)}, mode={MODES[dimensions]!r}"
    options += ", antialias=True" if dimensions == 2 else ""
    code = f"image = torch.nn.functional.interpolate(image[None], {options})[0]"
    cure = f"`{code}`, or MONAI's `Spacing` with the pixel size of the images it was trained on"
    return View("size", looks, cure, partial(resize, factor=factor), factor)


def _inverted() -> View:
    cure = "`image = image.max() + image.min() - image`, or the same for each channel if it has several"
    return View("inverted", "inverted, with bright for dark", cure, invert)


def rescale(images: Tensor, low: float, high: float) -> Tensor:
    """Scale each image from its 1st and 99.5th percentile to a range, and clip it."""
    values = images.flatten(1)
    values = values[:, :: max(1, values.shape[1] // _MOST_VALUES)]
    first, last = torch.quantile(values, torch.tensor(_QUANTILES, device=images.device), dim=1)
    shape = [-1] + [1] * (images.ndim - 1)
    unit: Tensor = (images - first.view(shape)) / (last - first).clamp_min(_LEAST_RANGE).view(shape)
    return low + (high - low) * unit.clamp(0, 1)


def standardise(images: Tensor) -> Tensor:
    """Subtract the mean of each image and divide by its standard deviation."""
    mean = images.mean(dim=list(range(1, images.ndim)), keepdim=True)
    std = images.flatten(1).std(dim=1).clamp_min(_LEAST_RANGE)
    standard: Tensor = (images - mean) / std.view(-1, *[1] * (images.ndim - 1))
    return standard


def _range(low: int, high: int) -> View:
    transform = f"ScaleIntensityRangePercentiles(1, 99.5, {low}, {high}, clip=True)"
    cure = f"scale each volume to {low} to {high}, as MONAI's `{transform}`"
    return View("range", "out of range", cure, partial(rescale, low=low, high=high))


def _standard() -> View:
    cure = "subtract the mean of each volume and divide by its standard deviation, as MONAI's `NormalizeIntensity()`"
    return View("range", "out of range", cure, standardise)


def _channel_orders(channels: int) -> list[View]:
    orders = [list(order) for order in islice(permutations(range(channels)), 1, 1 + _MOST_ORDERS)]
    looks = "as if their channels were in another order"
    return [View("channels", looks, f"`image = image[{order}]`", partial(_pick, order=order)) for order in orders]


def _pick(images: Tensor, order: list[int]) -> Tensor:
    return images[:, order]

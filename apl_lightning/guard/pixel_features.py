"""Features of single pixels that know nothing of a network: intensities at several scales, and position."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

_SCALES = (1.0, 2.0, 4.0, 8.0)
_SLICES = 16  # of a volume that are smoothed at a time


def pixel_features(images: Tensor, places: Tensor) -> Tensor:
    """Features of some pixels of each image.

    Per channel: the intensity, its Gaussian means with standard deviations of 1, 2, 4 and 8 pixels, and its standard
    deviation in a Gaussian window of 2 pixels. Then the position along each axis, from -1 to 1.

    Args:
        images: (B, C, *S).
        places: Indices of pixels in C order, (B, K).

    Returns:
        (B, K, 6 C + D), with D spatial dimensions.
    """
    images = images.float()
    centred = images - images.flatten(2).mean(dim=2).view(*images.shape[:2], *[1] * (images.ndim - 2))
    index = places[:, None].expand(-1, images.shape[1], -1)

    def taken(values: Tensor) -> Tensor:
        return values.flatten(2).gather(2, index).transpose(1, 2)

    # One whole map at a time: those of a volume are large.
    found = [taken(images), *(taken(_smooth(images, scale)) for scale in _SCALES)]
    variance = taken(_smooth(centred**2, _SCALES[1])) - taken(_smooth(centred, _SCALES[1])) ** 2
    return torch.cat([*found, variance.clamp_min(0).sqrt(), _positions(images.shape[2:], places)], dim=2)


def _positions(size: torch.Size, places: Tensor) -> Tensor:
    """The positions (B, K, D) of pixels (B, K), from -1 to 1 along each axis."""
    found: list[Tensor] = []
    for extent in reversed(size):
        found.insert(0, 2 * (places % extent) / max(1, extent - 1) - 1)
        places = places // extent
    return torch.stack(found, dim=-1)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """On a GPU, convolutions in float32: those of cuDNN round to TF32 by default."""
    # `torch.backends.cudnn.flags` raises if TF32 was set by torch's new interface.
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _smooth(images: Tensor, scale: float) -> Tensor:
    """Convolve (B, C, *S) with a Gaussian along each axis."""
    radius = int(3 * scale)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * scale**2))
    kernel = kernel / kernel.sum()
    dimensions = images.ndim - 2
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
    smoothed = images.flatten(0, 1)[:, None]
    for axis in range(dimensions):
        shape = [1] * axis + [len(kernel)] + [1] * (dimensions - 1 - axis)
        padding = [0, 0] * (dimensions - 1 - axis) + [radius, radius] + [0, 0] * axis
        # Convolutions in 3D take 50 times the memory of a volume with one channel: cut it across the axis.
        cut = 3 if axis == 0 else 2
        parts = smoothed.split(_SLICES, dim=cut) if dimensions == 3 else (smoothed,)
        with _without_cudnn():
            parts = [convolve(F.pad(part, padding, mode="replicate"), kernel.view(1, 1, *shape)) for part in parts]
        smoothed = torch.cat(parts, dim=cut) if dimensions == 3 else parts[0]
    return smoothed.view_as(images)

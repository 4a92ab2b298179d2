"""Features of single pixels that know nothing of a network: intensities at several scales, and position."""

import torch
from torch import Tensor
from torch.nn import functional as F

_SCALES = (1.0, 2.0, 4.0, 8.0)


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
    maps = [images, *(_smooth(images, scale) for scale in _SCALES)]
    variance = _smooth(centred**2, _SCALES[1]) - _smooth(centred, _SCALES[1]) ** 2
    maps.append(variance.clamp_min(0).sqrt())
    index = places[:, None].expand(-1, images.shape[1], -1)
    taken = [one.flatten(2).gather(2, index).transpose(1, 2) for one in maps]
    return torch.cat([*taken, _positions(images.shape[2:], places)], dim=2)


def _positions(size: torch.Size, places: Tensor) -> Tensor:
    """The positions (B, K, D) of pixels (B, K), from -1 to 1 along each axis."""
    found: list[Tensor] = []
    for extent in reversed(size):
        found.insert(0, 2 * (places % extent) / max(1, extent - 1) - 1)
        places = places // extent
    return torch.stack(found, dim=-1)


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
        with torch.backends.cudnn.flags(allow_tf32=False):
            smoothed = convolve(F.pad(smoothed, padding, mode="replicate"), kernel.view(1, 1, *shape))
    return smoothed.view_as(images)

"""Check raw images and convert them to network inputs."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_image(image: object) -> None:
    """Raise an error unless an image is a finite tensor (C, H, W) or (B, C, H, W) with 1 or 3 channels."""
    if not isinstance(image, Tensor):
        raise TypeError(f"Expected `image` to be a tensor, but got {type(image).__name__}.")
    if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3) or not image.numel():
        raise ValueError(
            f"Expected `image` of shape (C, H, W) or (B, C, H, W) with 1 or 3 channels, but got {tuple(image.shape)}."
        )
    if not image.isfinite().all():
        raise ValueError("Expected `image` to be finite, but got NaN or infinity: replace these values.")


def unit_image(image: Tensor, channels: int) -> Tensor:
    """Convert a grey or RGB image (C, H, W) or (B, C, H, W) to float32 in [0, 1] with `channels` channels, 1 or 3.

    Raises:
        TypeError: If `image` is not a tensor.
        ValueError: If it is neither uint8 nor floating point in [0, 1], or has another shape.
    """
    check_image(image)
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif not image.is_floating_point() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"Expected `image` to be uint8 or floats in [0, 1], but got {image.dtype} in "
            f"[{image.float().min():g}, {image.float().max():g}]: apply the window and the scaling of the training "
            "images first."
        )
    return repeat_channel(image.float(), channels)


def repeat_channel(image: Tensor, channels: int) -> Tensor:
    """Expand the only channel of an image (..., 1, H, W) to (..., channels, H, W)."""
    if image.shape[-3] not in (1, channels):
        raise ValueError(
            f"Expected `image` to have {channels} channel(s) or 1, but got shape {tuple(image.shape)}: select one "
            "channel."
        )
    return image.expand(*image.shape[:-3], channels, -1, -1)


class RawImageNetwork(ABC):
    """A network of the seven systems, which converts raw images to its inputs."""

    @abstractmethod
    def preprocess(self, image: Tensor) -> Tensor:
        """Convert a raw image (C, H, W) or images (B, C, H, W) to inputs of the network."""


class ZScorePreprocess(RawImageNetwork):
    """Preprocessing of SIFA's networks, with the attributes `in_channels` and `bounds`."""

    in_channels: int
    bounds: tuple[float, float]

    def set_bounds(self, bounds: tuple[float, float]) -> None:
        """Set the z-scores that `preprocess` maps to -1 and 1; a `ValueError` unless they increase."""
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"Expected `bounds` to be two increasing z-scores, but got {bounds}.")
        self.bounds = (float(bounds[0]), float(bounds[1]))

    def preprocess(self, image: Tensor) -> Tensor:
        """Normalize a slice (C, H, W), or all slices (B, C, H, W) of a volume, to z-scores; map `bounds` to [-1, 1]."""
        check_image(image)
        z = image.float()
        z = (z - z.mean()) / z.std(correction=0).clamp(min=1e-8)
        low, high = self.bounds
        return repeat_channel((z - low) / (high - low) * 2 - 1, self.in_channels)


class BGRPreprocess(RawImageNetwork):
    """Preprocessing of networks that were pretrained with Caffe."""

    def preprocess(self, image: Tensor) -> Tensor:
        """Convert a raw image, as in `unit_image`, to BGR in [0, 255] minus the ImageNet mean."""
        bgr = 255 * unit_image(image, 3).flip(-3)
        return bgr - torch.tensor(_MEAN_BGR, device=bgr.device)[:, None, None]


class ImageNetPreprocess(RawImageNetwork):
    """Preprocessing of networks that were pretrained with torchvision."""

    def preprocess(self, image: Tensor) -> Tensor:
        """Convert a raw image, as in `unit_image`, to RGB normalized with the mean and std of ImageNet."""
        rgb = unit_image(image, 3)
        mean, std = (torch.tensor(values, device=rgb.device)[:, None, None] for values in (_MEAN, _STD))
        return (rgb - mean) / std

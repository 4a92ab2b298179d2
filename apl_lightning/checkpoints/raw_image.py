"""Raw images as they come from a file, brought to what a network takes."""

from __future__ import annotations

import torch
from torch import Tensor

_MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def unit_image(image: Tensor, channels: int) -> Tensor:
    """A raw image as float32 in [0, 1] with the channels that a network takes; grey is repeated.

    Args:
        image: (C, H, W) or (B, C, H, W) with C = 1 (grey) or 3 (RGB): uint8 in 0..255, or floats in [0, 1].
        channels: 1 or 3.

    Raises:
        TypeError: If `image` is not a tensor.
        ValueError: If its shape or its values are others.
    """
    check_image(image)
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif not image.is_floating_point() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"Expected `image` to be uint8 or floats in [0, 1], but got {image.dtype} in [{image.min():g}, "
            f"{image.max():g}]: window and rescale it first, as the images that the network was trained on."
        )
    found = image.shape[-3]
    if found == channels:
        return image.float()
    if found != 1:
        raise ValueError(
            f"Expected `image` to have {channels} channel(s) or 1, but got shape {tuple(image.shape)}: choose one "
            "channel of it."
        )
    return image.float().expand(*image.shape[:-3], channels, *image.shape[-2:])


def check_image(image: object) -> None:
    """Raise unless `image` is a tensor (C, H, W) or (B, C, H, W) of finite numbers."""
    if not isinstance(image, Tensor):
        raise TypeError(f"Expected `image` to be a tensor, but got {type(image).__name__}.")
    if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3) or not image.numel():
        raise ValueError(
            f"Expected `image` of shape (C, H, W) or (B, C, H, W) with 1 or 3 channels, but got {tuple(image.shape)}."
        )
    if not image.isfinite().all():
        raise ValueError("Expected `image` to be finite, but it holds NaN or infinity.")


class BGRPreprocess:
    """Images as Caffe's networks take them."""

    def preprocess(self, image: Tensor) -> Tensor:
        """A raw image (see `unit_image`) as this network takes it: BGR in 0..255 minus the mean of ImageNet."""
        bgr = 255 * unit_image(image, 3).flip(-3)
        return bgr - torch.tensor(_MEAN_BGR, device=bgr.device)[:, None, None]


class ImageNetPreprocess:
    """Images as torchvision's networks take them."""

    def preprocess(self, image: Tensor) -> Tensor:
        """A raw image (see `unit_image`) as this network takes it: RGB, minus the mean of ImageNet, by its spread."""
        rgb = unit_image(image, 3)
        mean, std = (torch.tensor(values, device=rgb.device)[:, None, None] for values in (_MEAN, _STD))
        return (rgb - mean) / std

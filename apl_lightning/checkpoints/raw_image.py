"""Raw images as they come from a file, brought to one range and one number of channels."""

from __future__ import annotations

import torch
from torch import Tensor


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

"""The bilinear resize of TensorFlow 1, which differs from all modes of `F.interpolate`."""

import torch
from torch import Tensor


def legacy_resize(x: Tensor, factor: int) -> Tensor:
    """Upsample (B, C, H, W) by an integer as `tf.image.resize_images` of TensorFlow 1 does with `align_corners=False`.

    There are no half-pixel centres: output pixel i samples the input at i / factor. Positions after the last pixel
    repeat it.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        position = torch.arange(size * factor, device=x.device)
        low = position // factor
        weight = ((position % factor) / factor).to(x.dtype)
        left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = torch.lerp(left, right, weight if axis == 3 else weight[:, None])
    return x

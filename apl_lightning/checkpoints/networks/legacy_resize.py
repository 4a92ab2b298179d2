"""The bilinear resize of TensorFlow 1, which differs from all modes of `F.interpolate`."""

import torch
from torch import Tensor


def legacy_resize(x: Tensor, factor: int) -> Tensor:
    """Upsample like `tf.image.resize_images` of TensorFlow 1 with `align_corners=False`.

    There are no half-pixel centres: output pixel i samples the input at i / factor. Positions after the last pixel
    repeat it.

    Args:
        x: Tensor (B, C, H, W).
        factor: Integer scale factor.

    Returns:
        Tensor (B, C, factor * H, factor * W).

    Examples:
        >>> legacy_resize(torch.tensor([[[[0.0, 4.0]]]]), 2)[0, 0, 0]
        tensor([0., 2., 4., 4.])
    """
    for axis in (2, 3):
        size = x.shape[axis]
        position = torch.arange(size * factor, device=x.device)
        low = position // factor
        weight = ((position % factor) / factor).to(x.dtype)
        left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = torch.lerp(left, right, weight if axis == 3 else weight[:, None])
    return x

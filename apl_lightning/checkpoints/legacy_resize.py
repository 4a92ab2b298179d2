"""The bilinear resize of TensorFlow 1, which no mode of `F.interpolate` gives."""

from __future__ import annotations

import torch
from torch import Tensor


def legacy_resize(x: Tensor, factor: int) -> Tensor:
    """Enlarge (B, C, H, W) by an integer factor: output pixel i lies at input position i / factor.

    `tf.image.resize_images` of TensorFlow 1 with align_corners=False knows no half-pixel centres; what lies beyond the
    last pixel repeats it. Equal to::

        low = i // factor; high = min(low + 1, size - 1)
        out[i] = in[low] + (i / factor - low) * (in[high] - in[low])
    """
    for axis in (2, 3):
        size = x.shape[axis]
        position = torch.arange(size * factor, device=x.device)
        low = position // factor
        weight = ((position % factor) / factor).to(x.dtype)
        left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = torch.lerp(left, right, weight if axis == 3 else weight[:, None])
    return x

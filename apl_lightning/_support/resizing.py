"""Pixel values at another spatial size, in 1D, 2D and 3D."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def pool_to(values: Tensor, size: Sequence[int]) -> Tensor:
    """Means of (B, C, *S) over the cells of a grid of `size`."""
    pool = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[values.ndim]
    return pool(values, size)  # type: ignore[arg-type]


def resize_to(logits: Tensor, reference: Tensor) -> Tensor:
    """Logits (B, C, *S), interpolated linearly to the spatial size of `reference` (..., *S)."""
    size = reference.shape[-(logits.ndim - 2) :]
    if logits.shape[2:] == size:
        return logits
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[logits.ndim]
    return F.interpolate(logits, size=size, mode=mode, align_corners=False)

"""Logits at another spatial size, in 1D, 2D and 3D."""

from torch import Tensor
from torch.nn import functional as F


def resize_to(logits: Tensor, reference: Tensor) -> Tensor:
    """Logits (B, C, *S), interpolated linearly to the spatial size of `reference` (..., *S)."""
    size = reference.shape[-(logits.ndim - 2) :]
    if logits.shape[2:] == size:
        return logits
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[logits.ndim]
    return F.interpolate(logits, size=size, mode=mode, align_corners=False)

"""The bilinear resize that keeps corner pixels on corner pixels."""

from torch import Tensor
from torch.nn import functional as F


def corner_resize(logits: Tensor, image: Tensor) -> Tensor:
    """Resize logits (B, C, h, w) to the size of an image (B, C, H, W) with `align_corners=True`.

    The features of DeepLab and DRN lie at pixels 0, 8, 16 and so on. Without `align_corners` they move by up to 4
    pixels towards the centre of the image.
    """
    return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=True)

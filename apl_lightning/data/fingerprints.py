"""Fingerprints tie pseudo labels to the images that they were made on."""

import torch
from torch import Tensor
from torch.nn import functional as F

_CELLS = 4
_TOLERANCE = 1e-4


def fingerprint(image: Tensor) -> Tensor:
    """The means of an image (C, *S) over the cells of a grid, four along each axis: (4^D,)."""
    means = image.float().mean(dim=0)
    return F.interpolate(means[None, None], [_CELLS] * means.ndim, mode="area").flatten().cpu()


def check_fingerprint(found: Tensor, expected: Tensor, index: int) -> None:
    """Raise a `ValueError` if an image is not the one that its pseudo label was made on.

    The last digits may differ: another processor rounds differently. An empty `expected` is unknown.
    """
    if len(expected) and not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
        raise ValueError(
            f"Expected sample {index} to be the image that its pseudo label was made on, but it is another one: the "
            "data set must give the same image for the same index in every epoch, on every node and after a resume. "
            "Sort its files by name, and pass its random transforms as `transform`, which moves image, pseudo label "
            "and weight together."
        )

"""Denoisers turn the probability maps of the two heads into pseudo labels and weights, one method a file.

A denoiser is any callable `(p_main, p_aux) -> (labels, weights)` with probabilities of shape (B, C, *S), integer
labels of shape (B, *S) and weights of shape (B, *S) in [0, 1], where 0 ignores a pixel.
"""

from collections.abc import Callable

from torch import Tensor

from apl_lightning.denoisers.apl import APL

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

__all__ = ["APL", "Denoiser"]

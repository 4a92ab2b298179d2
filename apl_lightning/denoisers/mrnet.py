"""MRNet (Zheng and Yang, IJCV 2021): the divergence of two heads as a learnt uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning._support.resizing import resize_to
from apl_lightning.denoisers.base import Denoiser
from apl_lightning.denoisers.predictor import Predictor
from apl_lightning.losses import joint_mean

_STRIDE = 32  # at which most networks accept an image


@dataclass(eq=False)
class MRNet(Denoiser):
    r"""Labels averaged over scales and flips; the weights are recomputed, with gradient, in each training step.

    $$L(p_1, p_2) = \overline{e^{-v} \left[-\log p_1(\hat y)\right]} + \overline{v}, \qquad v = \mathrm{KL}(p_2, p_1)$$

    The loss is $L(p_m, p_a) + \frac{1}{2} L(p_a, p_m)$, with means over all pixels. The label is the argmax of the
    softmax of main + 0.5 aux logits, averaged over all views. Use it with
    [`SelfTrainingModule`][apl_lightning.refinement.SelfTrainingModule]. The original makes its labels once: set
    `every_n_epochs` of `PseudoLabelCallback` to the number of epochs or more.

    Args:
        scales: Relative sizes of the image, rounded to multiples of 32, which many networks need; a scale below 1
            never enlarges an axis.
        flips: Axes of (B, C, *S) along which the image is mirrored. The original mirrors photographs left and right,
            which is -1 for rows of pixels; volumes of [`NiftiFolder`][apl_lightning.data.NiftiFolder] in RAS lie left
            and right along 2. Pass `()` if classes differ by side (left and right kidney).
        aux_weight: The weight of the auxiliary head, in the label and in the loss.

    Raises:
        ValueError: If `scales` is empty, an axis of `flips` is not spatial, or a number is out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import MRNet
        >>> main, labels = torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long)
        >>> loss = MRNet().loss(main, main, labels, torch.ones(1, 3))  # heads that agree: 1.5 times cross-entropy
        >>> round(loss.item(), 4)
        1.0397
    """

    scales: Sequence[float] = (1.0, 0.8)
    flips: Sequence[int] = (-1,)
    aux_weight: float = 0.5

    def __post_init__(self) -> None:
        lists = isinstance(self.scales, Sequence) and isinstance(self.flips, Sequence)
        if not (lists and self.scales and all(scale > 0 for scale in self.scales) and self.aux_weight >= 0):
            raise ValueError(
                f"Expected a list of `scales` above 0, a list of `flips` and `aux_weight` >= 0, but got {self}."
            )
        if any(axis in (0, 1) for axis in self.flips):
            raise ValueError(
                f"Expected `flips` to be spatial axes of (B, C, *S), but got {self.flips}: the first spatial axis is 2."
            )

    def predict(self, predictor: Predictor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the views, returned for both heads."""
        total = torch.zeros(())
        views = list(product(self.scales, ((), *((axis,) for axis in self.flips))))
        for scale, flip in views:
            view = images if scale == 1 else _scaled(images, scale)
            main, aux = predictor.logits(view.flip(flip) if flip else view)
            logits = main.float() + self.aux_weight * aux.float()
            total = total.to(logits) + resize_to(logits.flip(flip) if flip else logits, images).softmax(dim=1)
        mean = total / len(views)
        return mean, mean

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of a batch (B, C, *S), all with weight 1."""
        labels = p_main.max(dim=1).indices
        return labels, torch.ones_like(labels, dtype=torch.float32)

    def loss(self, main: Tensor, aux: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The loss of both heads, each weighted by its divergence from the other one."""
        log_main, log_aux = main.float().log_softmax(dim=1), aux.float().log_softmax(dim=1)
        return _rectified(log_main, log_aux, labels, weights) + self.aux_weight * _rectified(
            log_aux, log_main, labels, weights
        )


def _rectified(log_p: Tensor, log_other: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    variance = (log_other.exp() * (log_other - log_p)).sum(dim=1)
    losses = F.nll_loss(log_p, labels, reduction="none")
    return joint_mean((-variance).exp() * losses + variance, weights)


def _scaled(images: Tensor, scale: float) -> Tensor:
    size = [_STRIDE * max(1, round(extent * scale / _STRIDE)) for extent in images.shape[2:]]
    if scale < 1:
        size = [min(pair) for pair in zip(size, images.shape[2:], strict=True)]
    return resize_to(images, torch.empty(size, device="meta"))

"""Chebyshev confidence (2024): keep the pixels whose label another dropout pass can hardly change."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apl_lightning.denoisers.base import Denoiser
from apl_lightning.denoisers.confidence import merge
from apl_lightning.denoisers.dropout import over_passes
from apl_lightning.denoisers.predictor import Predictor


@dataclass(eq=False)
class Chebyshev(Denoiser):
    r"""Weight 1 where $\frac{s^2}{s^2 + (p - 1/2)^2} < P$ and p > 1/2, with the mean p and variance s² of $p_{\hat y}$.

    Mean and variance are taken over passes with dropout. By the one-sided Chebyshev inequality the fraction is an upper
    bound of the probability that $p_{\hat y}$ of another pass lies below 1/2, if p lies above.

    Args:
        passes: Number of passes with dropout.
        dropout: The dropout rate on the features of the classifier, for networks without dropout layers.
        smallest: P of the first round.
        largest: P at the end of the ramp.
        rounds: Number of rounds of the ramp.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from apl_lightning import PseudoLabelCallback
        >>> from apl_lightning.denoisers import Chebyshev
        >>> callback = PseudoLabelCallback(denoiser=Chebyshev(passes=4))
    """

    passes: int = 20
    dropout: float = 0.5
    smallest: float = 0.001
    largest: float = 0.05
    rounds: int = 4

    def __post_init__(self) -> None:
        ramp_fits = 0 < self.smallest <= self.largest < 1 and self.rounds >= 1
        if not (self.passes > 1 and 0 < self.dropout < 1 and ramp_fits):
            raise ValueError(
                "Expected `passes` > 1, `dropout` between 0 and 1, 0 < `smallest` <= `largest` < 1 and `rounds` >= 1, "
                f"but got {self}."
            )
        self._bound = self.smallest

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        part = min(1.0, round / max(1, self.rounds - 1))
        self._bound = self.smallest + part * (self.largest - self.smallest)

    def predict(self, predictor: Predictor, images: Tensor) -> tuple[Tensor, ...]:
        """The mean over the passes for each head, and the variance of their merged prediction of the label."""
        return over_passes(predictor, images, self.passes, self.dropout)

    def __call__(self, p_main: Tensor, p_aux: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        mean, labels = merge(p_main, p_aux).max(dim=1)
        chance = variance / (variance + (mean - 0.5).square()).clamp_min(torch.finfo(mean.dtype).tiny)
        return labels, ((chance < self._bound) & (mean > 0.5)).float()

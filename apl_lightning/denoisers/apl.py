"""Adaptive Pseudo Labeling: merge both heads and weight each pixel by its margin."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apl_lightning.denoisers.base import Denoiser


@dataclass(frozen=True)
class APL(Denoiser):
    r"""Labels and weights from two heads without a threshold (Li et al., ICASSP 2022).

    $$\hat y = \mathrm{argmax}_c \, (p_m + \lambda p_a)_c, \qquad \omega = \delta_1 - \delta_2 \quad \text{(Eq. 3)}$$

    where $\delta_1$ and $\delta_2$ are the largest and the second largest probability of the merged prediction.

    Args:
        aux_weight: $\lambda$, the weight of the auxiliary head; that of the main head is 1.
        temperature: Probabilities are first softened to $p^{1/T}$ (renormalised). Values above 1 spread the weights of
            an over-confident network.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import APL
        >>> p_main = torch.tensor([0.7, 0.2, 0.1]).view(1, 3, 1)  # one image of one pixel
        >>> p_aux = torch.tensor([0.5, 0.4, 0.1]).view(1, 3, 1)
        >>> labels, weights = APL()(p_main, p_aux)
        >>> labels.item(), round(weights.item(), 4)
        (0, 0.3)
    """

    aux_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.aux_weight >= 0:
            raise ValueError(f"Expected `aux_weight` to be at least 0, but got {self.aux_weight}.")
        if not self.temperature > 0:
            raise ValueError(f"Expected `temperature` to be above 0, but got {self.temperature}.")

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, *S), int64, and weights (B, *S) in [0, 1] from the probabilities of both heads, (B, C, *S)."""
        # In place where nothing else sees it: the probabilities of a volume are large.
        merged = self._soften(p_aux) * self.aux_weight
        merged.add_(self._soften(p_main)).div_(1 + self.aux_weight)
        largest, labels = merged.max(dim=1)
        second = merged.scatter_(1, labels[:, None], -1).amax(dim=1)
        return labels, (largest - second).clamp(0, 1)

    def _soften(self, probabilities: Tensor) -> Tensor:
        if self.temperature == 1:
            return probabilities
        softened: Tensor = (
            probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log() / self.temperature
        ).softmax(dim=1)
        return softened

"""Adaptive Pseudo Labeling: merge both heads and weight each pixel by its margin, balanced over the classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apl_lightning._support.distributed import total_of_counts
from apl_lightning.denoisers.base import DatasetDenoiser

_STEPS = 2**16  # of a margin: a sum of integers does not depend on the order
_LARGEST_RISE = 2.0  # or the few pixels of a class that the network hardly ever predicts would count as certain


@dataclass(eq=False)
class APL(DatasetDenoiser):
    r"""Labels and weights from two heads without a threshold (Li et al., ICASSP 2022).

    $$\hat y = \mathrm{argmax}_c \, (p_m + \lambda p_a)_c, \qquad \omega = \delta_1 - \delta_2 \quad \text{(Eq. 3)}$$

    where $\delta_1$ and $\delta_2$ are the largest and the second largest probability of the merged prediction.

    Beyond the paper, the margins are balanced. With the mean $\bar\omega_c$ of the margins of a class over the data
    set,

    $$\omega' = \min\left(1, \; r_{\hat y} \, \omega\right), \qquad
    r_c = \min\left(2, \; \frac{\max_k \bar\omega_k}{\bar\omega_c}\right)$$

    A network is less sure of small organs than of the background. Without the balance they count less in training, and
    fade.

    Args:
        aux_weight: $\lambda$, the weight of the auxiliary head; that of the main head is 1.
        temperature: Probabilities are first softened to $p^{1/T}$ (renormalised). Values above 1 spread the weights of
            an over-confident network.
        balanced: Whether the margins are balanced; without, the weights are those of Eq. 3.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import APL, denoise
        >>> p_main = torch.tensor([[0.7, 0.9], [0.2, 0.1], [0.1, 0.0]])[None]  # one image of two pixels
        >>> p_aux = torch.tensor([[0.5, 0.1], [0.4, 0.7], [0.1, 0.2]])[None]
        >>> [(labels, weights)] = denoise(APL(balanced=False), [(p_main, p_aux)])
        >>> labels, weights
        (tensor([[0, 0]]), tensor([[0.3000, 0.1000]]))
    """

    aux_weight: float = 1.0
    temperature: float = 1.0
    balanced: bool = True

    def __post_init__(self) -> None:
        if not self.aux_weight >= 0:
            raise ValueError(f"Expected `aux_weight` to be at least 0, but got {self.aux_weight}.")
        if not self.temperature > 0:
            raise ValueError(f"Expected `temperature` to be above 0, but got {self.temperature}.")

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        self._device = device
        self._sums = torch.zeros(2, num_classes, dtype=torch.long)  # of margins in steps, and of pixels

    def observe(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        """Labels in small integers, and margins, (B, *S), from the probabilities of both heads, (B, C, *S)."""
        # In place where nothing else sees it: the probabilities of a volume are large.
        merged = self._soften(p_aux) * self.aux_weight
        merged.add_(self._soften(p_main)).div_(1 + self.aux_weight)
        largest, labels = merged.max(dim=1)
        second = merged.scatter_(1, labels[:, None], -1).amax(dim=1)
        classes = self._sums.shape[1]
        # Small integers, because they are kept until all images are predicted.
        labels = labels.to(torch.uint8 if classes <= 256 else torch.int32).cpu()
        margins = (largest - second).clamp(0, 1).cpu()
        if self.balanced:
            flat, steps = labels.flatten(), (margins.flatten() * _STEPS).round().double()
            sums = torch.bincount(flat, steps, minlength=classes).long()
            self._sums += torch.stack([sums, torch.bincount(flat, minlength=classes)])
        return labels, margins

    def settle(self) -> None:
        """Compute by how much the margins of each class rise, from the sums of all ranks; not at all without a sum."""
        margins, pixels = total_of_counts(self._sums, self._device).double()
        mean = margins / pixels.clamp_min(1)
        self._rise = torch.where(mean > 0, mean.max() / mean, 1).clamp_max(_LARGEST_RISE).float()

    def decide(self, labels: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Labels, int64, and weights in [0, 1]."""
        labels, margins, rise = labels.to(self._device).long(), margins.to(self._device), self._rise.to(self._device)
        return labels, (margins * rise[labels]).clamp_max(1)

    def _soften(self, probabilities: Tensor) -> Tensor:
        if self.temperature == 1:
            return probabilities
        softened: Tensor = (
            probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log() / self.temperature
        ).softmax(dim=1)
        return softened

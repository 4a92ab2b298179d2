"""CBST (Zou et al., ECCV 2018): keep the same portion of every class, larger in each round."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apl_lightning.denoisers.base import DatasetDenoiser
from apl_lightning.denoisers.confidence import class_logits, merge, of_steps, to_steps
from apl_lightning.denoisers.histogram import ConfidenceHistogram


@dataclass(eq=False)
class CBST(DatasetDenoiser):
    r"""Class-balanced self-training.

    $$\hat y = \mathrm{argmax}_c \, \frac{p_c}{\theta_c}, \qquad \omega = 1 \text{ where } \max_c \frac{p_c}{\theta_c}
    \ge 1, \text{ else } 0$$

    $\theta_c$ is the confidence at rank $\lfloor n_c \pi \rfloor$ among the $n_c$ pixels with prediction c, and 1 if
    there are none. The label may differ from the most probable class: a rare class has a low threshold.

    Args:
        portion: $\pi$ of the first round.
        step: The increase of $\pi$ in each further round.
        largest: The largest $\pi$.

    Raises:
        ValueError: If the portions are not between 0 and 1 and in order.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import CBST, denoise
        >>> p = torch.tensor([[[0.6, 0.7, 0.8, 0.9], [0.4, 0.3, 0.2, 0.1]]])  # one image of four pixels
        >>> [(labels, weights)] = denoise(CBST(portion=0.5), [(p, p)])
        >>> weights.tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """

    portion: float = 0.2
    step: float = 0.05
    largest: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.portion <= self.largest <= 1 and self.step >= 0):
            raise ValueError(f"Expected 0 < `portion` <= `largest` <= 1 and `step` >= 0, but got {self}.")
        self.thresholds = torch.empty(0)  # logits, (C,); infinite for a class without a pixel

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        """Start with empty counts and the portion of this round."""
        self._portion = min(self.largest, self.portion + round * self.step)
        self._histogram = ConfidenceHistogram(num_classes, device)

    def observe(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, ...]:
        merged = merge(p_main, p_aux)
        labels, confidence = self._histogram.observe(merged)
        return (to_steps(class_logits(merged, labels, of_steps(confidence))),)

    def settle(self) -> None:
        """Compute the thresholds from the counts of all ranks."""
        self._histogram.reduce()
        sizes = self._histogram.sizes()
        # In floating point the product may be just below a whole number.
        ranks = (sizes * self._portion + 1e-6).floor().long()
        self.thresholds = self._histogram.at_rank(ranks).nan_to_num(nan=torch.inf)

    def decide(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        return self._ratios(steps).max(dim=1).indices, self._keeps(steps)

    def _ratios(self, steps: Tensor) -> Tensor:
        r"""$p_c / \theta_c$ of a batch, (B, C, *S)."""
        return of_steps(steps).sigmoid() / self._thresholds_of(steps).sigmoid()

    def _keeps(self, steps: Tensor) -> Tensor:
        """1 where a class reaches its threshold, (B, *S); in logits, since probabilities saturate at 1 in float32."""
        return ((of_steps(steps) - self._thresholds_of(steps)).amax(dim=1) >= 0).float()

    def _thresholds_of(self, steps: Tensor) -> Tensor:
        return self.thresholds.view(1, -1, *[1] * (steps.ndim - 2))

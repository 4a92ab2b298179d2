"""BDL (Li et al., CVPR 2019): keep the more confident half of each class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apl_lightning.denoisers.base import DatasetDenoiser
from apl_lightning.denoisers.confidence import logit, merge, of_steps
from apl_lightning.denoisers.histogram import ConfidenceHistogram


@dataclass(eq=False)
class BDL(DatasetDenoiser):
    r"""Weight 1 where $\max_c p_c \ge \theta_c$, with thresholds $\theta_c = \min(\mathrm{median}_c, \tau)$.

    The median is taken over the confidence of all pixels of the data set with prediction c.

    Args:
        tau: The highest threshold.

    Raises:
        ValueError: If `tau` is not between 0 and 1.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import BDL, denoise
        >>> p = torch.tensor([[[0.6, 0.7, 0.8], [0.4, 0.3, 0.2]]])  # one image of three pixels
        >>> [(labels, weights)] = denoise(BDL(), [(p, p)])
        >>> weights.tolist()
        [[0.0, 1.0, 1.0]]
    """

    tau: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise ValueError(f"Expected `tau` between 0 and 1, but got {self.tau}.")
        self.thresholds = torch.empty(0)  # logits, (C,)

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        self._histogram = ConfidenceHistogram(num_classes, device)

    def observe(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, ...]:
        return self._histogram.observe(merge(p_main, p_aux))

    def settle(self) -> None:
        """Compute the thresholds from the counts of all ranks."""
        self._histogram.reduce()
        median = self._histogram.at_rank(self._histogram.sizes() // 2 + 1)
        self.thresholds = median.clamp_max(logit(self.tau))

    def decide(self, labels: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        return labels, (of_steps(confidence) >= self.thresholds[labels]).float()

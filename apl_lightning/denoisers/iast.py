"""IAST (Mei et al., ECCV 2020): thresholds that slowly follow the confidence of each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apl_lightning.denoisers.base import DatasetDenoiser
from apl_lightning.denoisers.confidence import merge, of_steps, to_steps
from apl_lightning.denoisers.histogram import ConfidenceHistogram
from apl_lightning.losses import divergence_from_uniform, entropy, joint_mean, mean_over_heads, weighted_cross_entropy


@dataclass(eq=False)
class IAST(DatasetDenoiser):
    r"""Weight 1 where $\max_c p_c \ge \theta_c$, with moving averages as thresholds.

    Each round updates $\theta_c \leftarrow \beta \theta_c + (1 - \beta)\, q_c$, where $q_c$ is the percentile
    $100 (1 - \alpha \theta_c^\gamma)$ of the confidence of the pixels with prediction c and of $\theta_c$ itself.
    $\theta_c$ starts at 0.9 and is at most 0.999. The original updates the thresholds after every image, on each
    process alone; here one histogram of all images and ranks updates them once a round. The loss adds the divergence
    from the uniform distribution on kept pixels and the entropy on the other pixels.

    Args:
        alphas: $\alpha$ of the first, second, ... round; the last one is used for all further rounds.
        beta: $\beta$.
        gamma: $\gamma$.
        kept_weight: The weight of the divergence on kept pixels.
        ignored_weight: The weight of the entropy on ignored pixels.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import IAST, denoise
        >>> p = torch.tensor([[[0.6, 0.99], [0.4, 0.01]]])  # one image of two pixels
        >>> [(labels, weights)] = denoise(IAST(), [(p, p)])
        >>> weights.tolist()
        [[0.0, 1.0]]
    """

    alphas: Sequence[float] = (0.2, 0.25, 0.3)
    beta: float = 0.9
    gamma: float = 8.0
    kept_weight: float = 0.1
    ignored_weight: float = 3.0

    def __post_init__(self) -> None:
        is_list = isinstance(self.alphas, Sequence)
        alphas_fit = is_list and self.alphas and all(0 < alpha < 1 for alpha in self.alphas)
        if not (alphas_fit and 0 <= self.beta <= 1 and min(self.gamma, self.kept_weight, self.ignored_weight) >= 0):
            raise ValueError(
                "Expected a list of `alphas` between 0 and 1, `beta` in [0, 1], and `gamma` and both weights >= 0, but "
                f"got {self}."
            )
        self.thresholds = torch.empty(0)  # probabilities, (C,)

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        """Start with empty counts; the thresholds stay."""
        if round == 0 or not len(self.thresholds):
            self.thresholds = torch.full((num_classes,), 0.9)
        self.thresholds = self.thresholds.to(device)
        self._alpha = self.alphas[min(round, len(self.alphas) - 1)]
        self._histogram = ConfidenceHistogram(num_classes, device)

    def observe(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, ...]:
        return self._histogram.observe(merge(p_main, p_aux))

    def settle(self) -> None:
        """Update the thresholds with the counts of all ranks."""
        self._histogram.reduce()
        self._histogram.add(
            torch.arange(len(self.thresholds)).to(self.thresholds.device), to_steps(self.thresholds.logit())
        )
        above = self._alpha * self.thresholds**self.gamma
        ranks = 1 + (above * (self._histogram.sizes() - 1)).round().long()
        percentile = self._histogram.at_rank(ranks).sigmoid()
        self.thresholds = (self.beta * self.thresholds + (1 - self.beta) * percentile).clamp_max(0.999)

    def decide(self, labels: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        return labels, (of_steps(confidence) >= self.thresholds.logit()[labels]).float()

    def loss(self, main: Tensor, aux: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy and divergence on kept pixels and entropy on ignored ones, averaged over both heads."""

        def regularised(logits: Tensor) -> Tensor:
            loss = weighted_cross_entropy(logits, labels, weights)
            loss = loss + self.kept_weight * joint_mean(divergence_from_uniform(logits), weights)
            return loss + self.ignored_weight * joint_mean(entropy(logits), (weights == 0).float())

        return mean_over_heads(regularised, main, aux)

    def state_dict(self) -> dict[str, Any]:
        return {"thresholds": self.thresholds.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.thresholds = state_dict["thresholds"]

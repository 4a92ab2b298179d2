"""CRST (Zou et al., ICCV 2019): CBST with a regulariser against over-confidence."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from apl_lightning.denoisers.cbst import CBST
from apl_lightning.denoisers.confidence import of_steps
from apl_lightning.losses import divergence_from_uniform, joint_mean, mean_over_heads, weighted_cross_entropy


@dataclass(eq=False)
class CRST(CBST):
    r"""The thresholds of CBST with a regulariser on the model or on the label.

    - `"mrkld"` (model regularised): the labels of CBST. The loss of each kept pixel is
      $-\log p_{\hat y} + \lambda \, \mathrm{KL}(u, p)$ with the uniform distribution u.
    - `"lrent"` (label regularised): soft labels $q_c \propto (p_c / \theta_c)^{1/\alpha}$. A pixel is kept where its
      label costs less than none, $\sum_c q_c (\alpha \log q_c - \log \frac{p_c}{\theta_c}) \le 0$, which is
      $\sum_c (p_c / \theta_c)^{1/\alpha} \ge 1$: also where several classes come close to their thresholds.

    Args:
        portion: As in [`CBST`][apl_lightning.denoisers.CBST].
        step: As in `CBST`.
        largest: As in `CBST`.
        regulariser: Which of the two.
        weight: $\lambda$ of MRKLD.
        alpha: $\alpha$ of LRENT.

    Raises:
        ValueError: If an option is unknown or out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import CRST, denoise
        >>> p = torch.tensor([[[0.6, 0.8], [0.4, 0.2]]])  # one image of two pixels
        >>> [(labels, weights)] = denoise(CRST(portion=0.5, regulariser="lrent"), [(p, p)])
        >>> labels.shape, weights.tolist()
        (torch.Size([1, 2, 2]), [[0.0, 1.0]])
    """

    regulariser: Literal["mrkld", "lrent"] = field(default="mrkld", kw_only=True)
    weight: float = field(default=0.1, kw_only=True)
    alpha: float = field(default=0.25, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.portion, str):
            raise TypeError(f"Expected `portion` first, but got {self.portion!r}: pass regulariser={self.portion!r}.")
        super().__post_init__()
        if self.regulariser not in ("mrkld", "lrent"):
            raise ValueError(f"Expected `regulariser` to be 'mrkld' or 'lrent', but got {self.regulariser!r}.")
        if not (self.weight >= 0 and self.alpha > 0):
            raise ValueError(f"Expected `weight` >= 0 and `alpha` > 0, but got {self.weight} and {self.alpha}.")

    def decide(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Labels, soft ones (B, C, *S) for LRENT, and weights of a batch."""
        if self.regulariser == "mrkld":
            return super().decide(steps)
        gains = (F.logsigmoid(of_steps(steps)) - F.logsigmoid(self._thresholds_of(steps))) / self.alpha
        # Where one class alone reaches its threshold, the sum is 1 but for rounding.
        keeps = (gains.logsumexp(dim=1) >= 0) | (self._keeps(steps) > 0)
        return gains.softmax(dim=1), keeps.float()

    def loss(self, main: Tensor, aux: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The loss over the kept pixels, averaged over both heads."""
        if self.regulariser == "lrent":
            return super().loss(main, aux, labels, weights)

        def regularised(logits: Tensor) -> Tensor:
            divergence = joint_mean(divergence_from_uniform(logits), weights)
            return weighted_cross_entropy(logits, labels, weights) + self.weight * divergence

        return mean_over_heads(regularised, main, aux)

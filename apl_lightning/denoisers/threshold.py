"""Pseudo-Label (Lee, 2013): keep the pixels above a fixed confidence."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning.denoisers.base import Denoiser
from apl_lightning.denoisers.confidence import logit, merge, predicted
from apl_lightning.losses import joint_mean, mean_over_heads


@dataclass(frozen=True)
class Threshold(Denoiser):
    r"""Labels of the mean prediction; weight 1 where $\max_c p_c > \tau$, else 0.

    Args:
        tau: The threshold; 0 keeps every pixel (plain pseudo labels).
        normalise: Whether the loss is the mean over the `"kept"` pixels or over `"all"`.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import Threshold
        >>> p = torch.tensor([[[0.95, 0.6], [0.05, 0.4]]])  # one image of two pixels
        >>> labels, weights = Threshold(tau=0.9)(p, p)
        >>> labels.tolist(), weights.tolist()
        ([[0, 0]], [[1.0, 0.0]])
    """

    tau: float = 0.9
    normalise: Literal["kept", "all"] = "kept"

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise ValueError(f"Expected `tau` in [0, 1), but got {self.tau}.")
        if self.normalise not in ("kept", "all"):
            raise ValueError(f"Expected `normalise` to be 'kept' or 'all', but got {self.normalise!r}.")

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        labels, confidence = predicted(merge(p_main, p_aux))
        return labels, (confidence > logit(self.tau)).float()

    def loss(self, main: Tensor, aux: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The cross-entropy, normalised as chosen and averaged over both heads."""
        if self.normalise == "kept":
            return super().loss(main, aux, labels, weights)

        def over_all(logits: Tensor) -> Tensor:
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            return joint_mean(weights * losses, torch.ones_like(weights))

        return mean_over_heads(over_all, main, aux)

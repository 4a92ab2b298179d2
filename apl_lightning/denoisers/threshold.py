"""Pseudo-Label (Lee, 2013): keep what is above a fixed confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning.denoisers.confidence import logit, merge, predicted
from apl_lightning.losses import joint_mean, weighted_cross_entropy


@dataclass(frozen=True)
class Threshold:
    r"""Labels of the mean prediction; weight 1 where $\max_c p_c > \tau$, else 0.

    Args:
        tau: The threshold; 0 keeps every pixel (plain pseudo labels).
        normalise: Divide the summed cross-entropy by the number of `"kept"` pixels or of `"all"`: two different losses.

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
        """Denoise one batch of (B, C, *S)."""
        labels, confidence = predicted(merge(p_main, p_aux))
        return labels, (confidence > logit(self.tau)).float()

    def loss(self, main: Tensor, aux: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The mean over both heads of the cross-entropy, normalised as asked for."""
        per_head = []
        for logits in (main, aux):
            if self.normalise == "kept":
                per_head.append(weighted_cross_entropy(logits, labels, weights))
            else:
                losses = F.cross_entropy(logits.float(), labels, reduction="none")
                per_head.append(joint_mean(weights * losses, torch.ones_like(weights)))
        return torch.stack(per_head).mean()

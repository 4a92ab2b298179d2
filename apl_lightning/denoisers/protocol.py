"""What the label pass expects of a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

LabelsAndWeights = tuple[Tensor, Tensor]


@runtime_checkable
class DatasetDenoiser(Protocol):
    """A denoiser that sees the whole data set before it decides."""

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        """A new round begins."""

    def observe(self, *predictions: Tensor) -> tuple[Tensor, ...]:
        """Count a batch; what it returns comes back in `decide`."""

    def settle(self) -> None:
        """Reduce the counts over ranks; called on all of them after the last batch."""

    def decide(self, *observed: Tensor) -> LabelsAndWeights:
        """Labels and weights of a batch."""


Denoiser = Callable[..., LabelsAndWeights] | DatasetDenoiser


def hard_labels(labels: Tensor, weights: Tensor) -> Tensor:
    """Classes (B, *S) of labels that may be soft, (B, C, *S), beside their weights (B, *S)."""
    return labels if labels.ndim == weights.ndim else labels.max(dim=1).indices


def denoise(denoiser: Denoiser, batches: Iterable[tuple[Tensor, ...]], round: int = 0) -> list[LabelsAndWeights]:
    """Apply any denoiser to predictions that are there, as the label pass does.

    Args:
        denoiser: The method.
        batches: For each batch what the denoiser takes: probabilities of both heads, (B, C, *S), and what else its
            `predict` gives.
        round: Which round it is.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import APL, denoise
        >>> p = torch.tensor([[[0.7], [0.3]]])
        >>> [(labels, weights)] = denoise(APL(), [(p, p)])
        >>> round(weights.item(), 4)
        0.4
    """
    batches = list(batches)
    if hasattr(denoiser, "begin"):
        denoiser.begin(round, batches[0][0].shape[1], batches[0][0].device)
    if not isinstance(denoiser, DatasetDenoiser):
        return [denoiser(*batch) for batch in batches]
    observed = [denoiser.observe(*batch) for batch in batches]
    denoiser.settle()
    return [denoiser.decide(*kept) for kept in observed]

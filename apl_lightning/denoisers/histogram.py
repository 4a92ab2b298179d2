"""Histograms of the confidence of each class over a data set."""

import torch
from torch import Tensor

from apl_lightning._support.distributed import total
from apl_lightning.denoisers.confidence import STEPS, predicted, to_steps

_LOW, _HIGH = -8, 88  # logits; float32 has no probability below that of -87.4
_BINS = (_HIGH - _LOW) * STEPS + 1


class ConfidenceHistogram:
    """Counts of the confidence of each predicted class, in steps of 1/256 of a logit.

    Bins are even in the logit of the probability: with linear bins all background pixels fall into the last one. They
    are as fine as the confidences that are kept, so pixels of one confidence lie on one side of a threshold.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_classes, _BINS, dtype=torch.long, device=device)

    def add(self, labels: Tensor, steps: Tensor) -> None:
        """Count pixels with labels and confidences (`to_steps`) of any one shape, on any device."""
        bins = (steps.long() - _LOW * STEPS).clamp_(0, _BINS - 1)
        cells = (labels * _BINS + bins).flatten()
        counts = torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)
        self.counts += counts.to(self.counts.device)

    def observe(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch of (B, C, *S); returns its labels and the steps of their confidence, (B, *S) each."""
        labels, logits = predicted(probabilities)
        steps = to_steps(logits)
        self.add(labels, steps)
        return labels, steps

    def reduce(self) -> None:
        """Sum over ranks; all must call it."""
        self.counts = total(self.counts)

    def sizes(self) -> Tensor:
        """Pixels per class, (C,)."""
        return self.counts.sum(dim=1)

    def at_rank(self, ranks: Tensor) -> Tensor:
        """The logit of the pixel of each class at a rank (1 is the most confident one), (C,); NaN if there is none."""
        found = self.counts.flip(1).cumsum(dim=1) >= ranks[:, None]
        logits = _HIGH - found.long().argmax(dim=1) / STEPS
        return torch.where(found.any(dim=1) & (ranks >= 1), logits, torch.nan)

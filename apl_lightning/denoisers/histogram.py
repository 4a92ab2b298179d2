"""Histograms of the confidence of each class over a data set."""

import torch
from torch import Tensor

from apl_lightning._support.distributed import total
from apl_lightning.denoisers.confidence import predicted

_LOW, _HIGH, _BINS = -4.0, 28.0, 1024


class ConfidenceHistogram:
    """Counts of the confidence of each predicted class, in bins of 1/32 of a logit.

    Bins are even in the logit of the probability: with linear bins all background pixels fall into the last one.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_classes, _BINS, dtype=torch.long, device=device)

    def add(self, labels: Tensor, logits: Tensor) -> None:
        """Count pixels with labels and logits of any one shape, on any device."""
        bins = ((logits - _LOW) * (_BINS / (_HIGH - _LOW))).long().clamp_(0, _BINS - 1)
        cells = (labels * _BINS + bins).flatten()
        counts = torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)
        self.counts += counts.to(self.counts.device)

    def observe(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch of (B, C, *S); returns its labels and the logits of their confidence, (B, *S) each."""
        labels, logits = predicted(probabilities)
        self.add(labels, logits)
        return labels, logits

    def reduce(self) -> None:
        """Sum over ranks; all must call it."""
        self.counts = total(self.counts)

    def sizes(self) -> Tensor:
        """Pixels per class, (C,)."""
        return self.counts.sum(dim=1)

    def at_rank(self, ranks: Tensor) -> Tensor:
        """The logit of the pixel of each class at a rank (1 is the most confident one), (C,); NaN if there is none."""
        descending = self.counts.flip(1)
        above = descending.cumsum(dim=1)
        found = (above >= ranks[:, None]).long()
        place = found.argmax(dim=1, keepdim=True)
        within = descending.gather(1, place)
        part = (ranks[:, None] - above.gather(1, place) + within) / within.clamp_min(1)
        logits = _HIGH - (place + part) * ((_HIGH - _LOW) / _BINS)
        return torch.where((found.any(dim=1) & (ranks >= 1)), logits[:, 0], torch.nan)

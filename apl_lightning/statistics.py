"""What can be told about a round of pseudo labels without any target label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apl_lightning.denoisers.confidence import merge
from apl_lightning.metrics import overlap_counts
from apl_lightning.ranks import total_of_counts
from apl_lightning.validators import LabelFreeValidators


class RoundStatistics:
    """Sums over the pixels of a round, reduced over ranks once at its end.

    Args:
        class_names: Names for `class_ratio`, background included.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = list(class_names)
        classes = self.num_classes = len(self._names)
        self._sums = torch.zeros(5, dtype=torch.float64)  # pixels, agreeing, weight, compared with before, changed
        self._counts = torch.zeros(classes, dtype=torch.long)
        self._validators = LabelFreeValidators(classes)
        self._overlap = torch.zeros(3, classes, dtype=torch.long)  # both, pseudo label, reference

    def see(self, p_main: Tensor, p_aux: Tensor) -> None:
        """Count where the heads agree and how good the network looks, from the probabilities of both, (B, C, *S)."""
        agree = p_main.max(dim=1).indices == p_aux.max(dim=1).indices
        self._sums[:2] += torch.tensor([agree.numel(), int(agree.sum())])
        self._validators.update(merge(p_main, p_aux))

    def add(self, labels: Tensor, weights: Tensor) -> None:
        """Count labels (B, *S) and weights (B, *S)."""
        self._sums[2] += float(weights.double().sum())
        self._counts += torch.bincount(labels.flatten(), minlength=self.num_classes)

    def compare(self, labels: Tensor, before: Tensor) -> None:
        """Count what changed since the round before."""
        self._sums[3:] += torch.tensor([labels.numel(), int((labels != before).sum())])

    def diagnose(self, labels: Tensor, reference: Tensor) -> None:
        """Count the overlap with reference labels, for the log alone."""
        classes = self.num_classes
        low, high = (int(value) for value in reference.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"Expected reference labels between 0 and {classes - 1}, but got values from {low} to {high}: map "
                "them, or leave the labels out of the target data set (they only serve `pseudo/dice`)."
            )
        self._overlap += overlap_counts(labels, reference, classes)

    def compute(self, device: torch.device) -> dict[str, float]:
        """The statistics over all ranks, under their names in the log; a collective on `device`."""
        flat = torch.cat([self._sums, self._counts.double(), self._overlap.flatten().double()])
        flat = total_of_counts(flat, device)
        classes = self.num_classes
        pixels, agreeing, weight, compared, changed = flat[:5].tolist()
        values = {"pseudo/confidence": weight / pixels, "pseudo/agreement": agreeing / pixels}
        values |= {f"pseudo/{name}": value for name, value in self._validators.compute(device).items()}
        if compared:
            values["pseudo/changed"] = changed / compared
        ratios = flat[5 : 5 + classes] / pixels
        values |= {f"pseudo/class_ratio/{name}": float(ratio) for name, ratio in zip(self._names, ratios, strict=True)}
        both, ours, reference = flat[5 + classes :].view(3, classes)[:, 1:]
        if reference.any():
            values["pseudo/dice"] = float((2 * both / (ours + reference)).nanmean())
        return values

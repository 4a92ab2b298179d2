"""Dice per class and case."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from apl_lightning.ranks import gather


def overlap_counts(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Per class, the pixels of both, of the prediction and of the reference: (3, num_classes) from class indices."""
    pairs = torch.bincount((labels * num_classes + predictions).flatten(), minlength=num_classes**2)
    matrix = pairs.view(num_classes, num_classes)
    return torch.stack([matrix.diagonal(), matrix.sum(dim=0), matrix.sum(dim=1)])


class CaseDice(Metric):
    r"""The Dice coefficient per class, over all slices of a case together, averaged over cases.

    $$\mathrm{Dice}_c = \frac{2 \, |P_c \cap T_c|}{|P_c| + |T_c|}$$

    1 is best, 0 worst. A class that neither the prediction nor the reference of a case holds does not count for
    that case; one that only the prediction holds counts 0. Samples are told apart by their index: one that a
    distributed sampler gave to two ranks counts once.

    Args:
        num_classes: Number of classes, background included.

    Examples:
        >>> import torch
        >>> from apl_lightning.metrics import CaseDice
        >>> dice = CaseDice(num_classes=3)
        >>> dice.update(torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 0, 2, 0]]), cases=["patient 1"])
        >>> dice.compute()
        tensor([0.6667, 0.6667, 1.0000])
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, num_classes: int) -> None:
        # The counts are gathered in `compute`: the cases, and so the size of the state, are not known beforehand.
        super().__init__(sync_on_compute=False)
        self.num_classes = num_classes
        self._counts: dict[int | tuple[str, int], tuple[str | None, Tensor]] = {}

    def update(
        self,
        predictions: Tensor,
        labels: Tensor,
        cases: Sequence[str] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Count a batch.

        Args:
            predictions: Class indices, (B, *S).
            labels: Reference class indices, (B, *S).
            cases: The case of each sample; each is its own by default.
            indices: What tells the samples apart; by default they all differ.

        Raises:
            ValueError: If the shapes differ, or a label is out of range.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"Expected predictions and labels of one shape (B, *S), but got {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"Expected reference labels between 0 and {self.num_classes - 1}, but got values from "
                f"{int(labels.min())} to {int(labels.max())}: check `num_classes`, or map the labels."
            )
        for position, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
            counts = overlap_counts(prediction, label, self.num_classes).cpu()
            key = ("no index", len(self._counts)) if indices is None else int(indices[position])
            self._counts[key] = (None if cases is None else cases[position], counts)

    def compute(self) -> Tensor:
        """Dice per class, (num_classes,); NaN for a class that occurs nowhere."""
        table = self.per_case()
        return torch.stack(list(table.values())).nanmean(dim=0) if table else torch.full((self.num_classes,), torch.nan)

    def per_case(self) -> dict[str, Tensor]:
        """Dice per class of each case; NaN where a class is absent from prediction and reference."""
        # A sample without an index is another one on every rank, and one without a case is a case of its own.
        samples = {
            (rank, key) if isinstance(key, tuple) else key: value
            for rank, counts in enumerate(gather(self._counts))
            for key, value in counts.items()
        }
        named = [(str(key) if case is None else case, counts) for key, (case, counts) in samples.items()]
        cases: dict[str, Tensor] = {}
        for case, counts in sorted(named, key=lambda item: item[0]):
            cases[case] = cases.get(case, 0) + counts
        return {case: 2 * both / (predicted + true) for case, (both, predicted, true) in cases.items()}

    def reset(self) -> None:
        """Forget all counts."""
        super().reset()
        self._counts = {}

"""Dice per class and case."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apl_lightning._support.distributed import gather


def overlap_counts(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """(3, num_classes): pixels in both, in the prediction and in the reference, from class indices of any type.

    Pixels whose label is `ignore_index` do not count. An index out of range is a `ValueError`.
    """
    # An inferer may put the predictions of a volume together on the CPU; uint8 would overflow.
    labels, predictions = labels.to(predictions.device).long(), predictions.long()
    if ignore_index is not None:
        counted = labels != ignore_index
        predictions, labels = predictions[counted], labels[counted]
    if not labels.numel():
        return predictions.new_zeros(3, num_classes)
    low, high, lowest, highest = torch.stack([*labels.aminmax(), *predictions.aminmax()]).tolist()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Expected reference labels between 0 and {num_classes - 1}, but got values from {low} to {high}: check "
            "`num_classes`, or pass `ignore_index`, the label of pixels that do not count. (Labels of target images "
            "only serve `pseudo/dice` and may be left out.)"
        )
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"Expected predicted classes between 0 and {num_classes - 1}, but got values from {lowest} to {highest}: "
            "check `num_classes`."
        )
    pairs = torch.bincount((labels * num_classes + predictions).flatten(), minlength=num_classes**2)
    matrix = pairs.view(num_classes, num_classes)
    return torch.stack([matrix.diagonal(), matrix.sum(dim=0), matrix.sum(dim=1)])


def dice_of(counts: Tensor) -> Tensor:
    """Dice per class, (num_classes,), from `overlap_counts`; NaN for a class in neither prediction nor reference."""
    both, predicted, reference = counts
    dice: Tensor = 2 * both / (predicted + reference)
    return dice


class CaseDice:
    r"""The Dice coefficient per class, over all slices of a case together, averaged over cases.

    $$\mathrm{Dice}_c = \frac{2 \, |P_c \cap T_c|}{|P_c| + |T_c|}$$

    1 is best, 0 is worst. A class that is absent from prediction and reference of a case does not count for that case;
    a class in the prediction alone counts 0. A sample that a distributed sampler gives to two ranks counts once, if
    `update` gets its index.

    Args:
        num_classes: Number of classes, background included.
        ignore_index: The label of pixels that do not count.

    Examples:
        >>> import torch
        >>> from apl_lightning.metrics import CaseDice
        >>> dice = CaseDice(num_classes=3)
        >>> dice.update(torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 0, 2, 0]]), cases=["patient 1"])
        >>> dice.compute()
        tensor([0.6667, 0.6667, 1.0000])
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._counts: dict[int | tuple[str, int], tuple[str | None, Tensor]] = {}

    def update(
        self,
        predictions: Tensor,
        labels: Tensor,
        cases: Sequence[str | None] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Count a batch of predicted and reference class indices, (B, *S) each.

        A sample without a case is a case of its own. `indices` are those of the samples in their data set.

        Raises:
            ValueError: If the shapes differ, or a class is out of range.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"Expected predictions and labels of one shape (B, *S), but got {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}."
            )
        for position, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
            counts = overlap_counts(prediction, label, self.num_classes, self.ignore_index).cpu()
            key = ("no index", len(self._counts)) if indices is None else int(indices[position])
            self._counts[key] = (None if cases is None else cases[position], counts)

    def compute(self, all_ranks: bool = True) -> Tensor:
        """Dice per class over all ranks, or those of this one, (num_classes,); NaN for a class that never occurs."""
        table = self.per_case(all_ranks)
        return torch.stack(list(table.values())).nanmean(dim=0) if table else torch.full((self.num_classes,), torch.nan)

    def per_case(self, all_ranks: bool = True) -> dict[str, Tensor]:
        """Dice per class of each case; NaN for a class that is absent from prediction and reference."""
        # Samples without an index differ between ranks, and a sample without a case is a case.
        samples = {
            (rank, key) if isinstance(key, tuple) else key: value
            for rank, counts in enumerate(gather(self._counts) if all_ranks else [self._counts])
            for key, value in counts.items()
        }
        named = [(f"sample {key}" if case is None else case, counts) for key, (case, counts) in samples.items()]
        cases: dict[str, Tensor] = {}
        for case, counts in sorted(named, key=lambda item: item[0]):
            cases[case] = cases.get(case, 0) + counts
        return {case: dice_of(counts) for case, counts in cases.items()}

    def reset(self) -> None:
        """Forget all counts."""
        self._counts = {}

"""Statistics of a round of pseudo labels, for the log."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from apl_lightning._support.distributed import total_of_counts
from apl_lightning.metrics import dice_of, overlap_counts

_DOUBTFUL_AGREEMENT = 0.5  # of the pixels; two heads of one network agree on nearly all


class LabelStatistics:
    """Sums over the pixels of a round, reduced over ranks once at the end."""

    def __init__(self, class_names: Sequence[str], ignore_index: int | None = None) -> None:
        self._names = list(class_names)
        self._ignore_index = ignore_index
        classes = self.num_classes = len(self._names)
        # Pixels, weights; pixels of the round before, changed ones; predicted pixels, those where both heads agree.
        self._sums = torch.zeros(6, dtype=torch.float64)
        self._counts = torch.zeros(classes, dtype=torch.long)
        self._overlap = torch.zeros(3, classes, dtype=torch.long)  # both, pseudo label, reference

    def add(self, labels: Tensor, weights: Tensor) -> None:
        """Count labels (B, *S) and weights (B, *S)."""
        self._sums[:2] += torch.tensor([labels.numel(), float(weights.double().sum())], dtype=torch.float64)
        self._counts += torch.bincount(labels.flatten(), minlength=self.num_classes)

    def compare(self, labels: Tensor, before: Tensor) -> None:
        """Count the pixels whose label differs from the round before."""
        self._sums[2:4] += torch.tensor([labels.numel(), int((labels != before).sum())])

    def agree(self, main: Tensor, aux: Tensor) -> None:
        """Count the pixels where both heads predict the same class, from two label maps."""
        self._sums[4:] += torch.tensor([main.numel(), int((main == aux).sum())])

    def diagnose(self, labels: Tensor, reference: Tensor) -> None:
        """Count the overlap with reference labels, for the log alone."""
        self._overlap += overlap_counts(labels, reference, self.num_classes, self._ignore_index)

    def compute(self, device: torch.device) -> dict[str, float]:
        """The statistics over all ranks, by their names in the log; a collective on `device`."""
        classes = self.num_classes
        flat = torch.cat([self._sums, self._counts.double(), self._overlap.flatten().double()])
        flat = total_of_counts(flat, device)
        pixels, weight, compared, changed, predicted, alike = flat[:6].tolist()
        values = {"pseudo/confidence": weight / pixels}
        if predicted:
            values["pseudo/agreement"] = alike / predicted
        if compared:
            values["pseudo/changed"] = changed / compared
        ratios = flat[6 : 6 + classes] / pixels
        values |= {f"pseudo/class_ratio/{name}": float(ratio) for name, ratio in zip(self._names, ratios, strict=True)}
        overlap = flat[6 + classes :].view(3, classes)[:, 1:]
        if overlap[2].any():  # there are reference labels
            values["pseudo/dice"] = float(dice_of(overlap).nanmean())
        return values


def warn_of_doubts(statistics: dict[str, float], round: int, denoiser: str | None) -> None:
    """Warn of labels that teach nothing, and of heads that cannot both be right."""
    if not statistics["pseudo/confidence"]:
        warnings.warn(
            f"In round {round} no pixel has a weight above 0, so nothing is learned from its labels: choose another "
            f"denoiser than {denoiser}, or options that keep more.",
            stacklevel=3,
        )
    agreement = statistics.get("pseudo/agreement", 1.0)  # denoisers that merge the heads do not count it
    if round == 0 and agreement < _DOUBTFUL_AGREEMENT:
        warnings.warn(
            f"Before refinement the two heads agree on {agreement:.0%} of the pixels only. If the network also returns "
            "something else than segmentations, such as a reconstruction with as many channels, pass aux='perturbed' "
            "and `main_output` to the module. If its weights were loaded after the module was made, load them before.",
            stacklevel=3,
        )

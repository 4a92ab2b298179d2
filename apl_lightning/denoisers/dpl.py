"""DPL (Chen et al., MICCAI 2021): keep the pixels that are stable under dropout and close to their class prototype."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning._support.distributed import gather
from apl_lightning._support.resizing import resize_to
from apl_lightning.denoisers.base import DatasetDenoiser
from apl_lightning.denoisers.confidence import merge
from apl_lightning.denoisers.dropout import over_passes
from apl_lightning.denoisers.predictor import Predictor


@dataclass(eq=False)
class DPL(DatasetDenoiser):
    r"""Denoised pseudo labels by uncertainty and prototypes.

    The label is the argmax of the mean of K passes with dropout. A pixel has weight 1 where the standard deviation of
    $p_{\hat y}$ (softened with a temperature) over the passes is below $\eta$ and the nearest class prototype has the
    same label. The prototype of a class is the mean, over the data set, of the features of its stable pixels, weighted
    by their probability; a class that never occurs has none.

    Args:
        passes: K.
        dropout: The dropout rate on the features of the classifier, for networks without dropout layers.
        eta: The largest standard deviation.
        temperature: Softens the probabilities before the standard deviation is taken.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from apl_lightning import PseudoLabelCallback
        >>> from apl_lightning.denoisers import DPL
        >>> callback = PseudoLabelCallback(denoiser=DPL(passes=4))
    """

    passes: int = 10
    dropout: float = 0.5
    eta: float = 0.05
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not (self.passes > 1 and 0 < self.dropout < 1 and self.eta > 0 and self.temperature > 0):
            raise ValueError(
                f"Expected `passes` > 1, `dropout` between 0 and 1, `eta` > 0 and `temperature` > 0, but got {self}."
            )
        self.prototypes = torch.empty(0)  # (C, F)

    def predict(self, predictor: Predictor, images: Tensor) -> tuple[Tensor, ...]:
        """Mean probabilities of both heads, the standard deviation of the label's, and the features of a plain pass."""
        features = predictor.features(images)
        p_main, p_aux, variance = over_passes(predictor, images, self.passes, self.dropout, self.temperature)
        return p_main, p_aux, variance.sqrt(), features

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        self._classes = num_classes
        self._device = device
        self._sums: Tensor | None = None

    def observe(self, p_main: Tensor, p_aux: Tensor, deviation: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """Add the features of a batch to the prototypes of its labels."""
        confidence, labels = merge(p_main, p_aux).max(dim=1)
        stable = deviation < self.eta
        share = F.one_hot(labels, self._classes).movedim(-1, 1) * (stable * confidence)[:, None]
        share = F.interpolate(share, features.shape[2:], mode="area").flatten(2)
        flat = features.float().flatten(2).transpose(1, 2)
        sums = torch.cat([share @ flat, share.sum(dim=2, keepdim=True)], dim=2)
        sums = sums.cpu().double().sum(dim=0)  # hardly rounded, so the ranks may add them in any order
        self._sums = sums if self._sums is None else self._sums + sums
        return labels, stable, features.half()

    def settle(self) -> None:
        """Compute the prototypes from the sums of all ranks."""
        shares = [share for share in gather(self._sums) if share is not None]
        sums = torch.stack(shares).sum(dim=0).float().to(self._device)
        self.prototypes = sums[:, :-1] / sums[:, -1:]  # 0 / 0 for a class that never occurs

    def decide(self, labels: Tensor, stable: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        flat = features.float().flatten(2).transpose(1, 2)
        absent = self.prototypes.isnan().any(dim=1)
        prototypes = self.prototypes.nan_to_num().expand(len(flat), -1, -1)
        # By a matrix product, features far from 0 would lose their small distances.
        distances = torch.cdist(flat, prototypes, compute_mode="donot_use_mm_for_euclid_dist").transpose(1, 2)
        distances = resize_to(distances.unflatten(2, features.shape[2:]), labels)
        distances[:, absent] = torch.inf
        return labels, (stable & (distances.min(dim=1).indices == labels)).float()

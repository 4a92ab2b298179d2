"""DPL (Chen et al., MICCAI 2021): keep what dropout does not move and what a class prototype confirms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning.denoisers.confidence import merge
from apl_lightning.predictor import Predictor
from apl_lightning.ranks import gather
from apl_lightning.resizing import pool_to, resize_to


class DPL:
    r"""Denoised pseudo labelling by uncertainty and prototypes.

    The label is the argmax of the mean of K passes with dropout. It is kept where the standard deviation of
    $p_{\hat y}$ (softened with a temperature) over the passes is below $\eta$ and the nearest class prototype gives the
    same label. A prototype is the mean of the features of the pixels of one label that dropout does not move, each
    weighted by its probability, over the data set; a class that never occurs has none.

    Args:
        passes: K.
        dropout: The rate before the classifier in networks that have no dropout of their own.
        eta: The largest standard deviation.
        temperature: Softens the probabilities whose deviation is taken.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from apl_lightning import PseudoLabelCallback
        >>> from apl_lightning.denoisers import DPL
        >>> callback = PseudoLabelCallback(denoiser=DPL(passes=4))
    """

    def __init__(self, passes: int = 10, dropout: float = 0.5, eta: float = 0.05, temperature: float = 2.0) -> None:
        if not (passes > 1 and 0 < dropout < 1 and eta > 0 and temperature > 0):
            raise ValueError(
                "Expected `passes` > 1, `dropout` between 0 and 1, `eta` > 0 and `temperature` > 0, but got "
                f"{passes}, {dropout}, {eta} and {temperature}."
            )
        self.passes = passes
        self.dropout = dropout
        self.eta = eta
        self.temperature = temperature
        self.prototypes = torch.empty(0)  # (C, F)

    def predict(self, predictor: Predictor, images: Tensor) -> tuple[Tensor, ...]:
        """Mean probabilities of both heads, whether dropout moves the label's, and the features of a plain pass."""
        features = predictor.features(images)
        passes = [predictor.with_dropout(images, self.dropout) for _ in range(self.passes)]
        p_main, p_aux = (torch.stack([p[head].softmax(dim=1) for p in passes]).mean(dim=0) for head in (0, 1))
        labels = merge(p_main, p_aux).max(dim=1).indices[:, None]
        softened = [
            merge(*((logits / self.temperature).softmax(dim=1) for logits in p)).gather(1, labels)[:, 0] for p in passes
        ]
        return p_main, p_aux, torch.stack(softened).std(dim=0, correction=0), features

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:
        """Forget the round before."""
        self._classes = num_classes
        self._device = device
        self._sums: Tensor | None = None

    def observe(self, p_main: Tensor, p_aux: Tensor, deviation: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        """Add the features of a batch to the prototypes of its labels."""
        confidence, labels = merge(p_main, p_aux).max(dim=1)
        steady = deviation < self.eta
        share = F.one_hot(labels, self._classes).movedim(-1, 1) * (steady * confidence)[:, None]
        share = pool_to(share, features.shape[2:]).flatten(2)
        flat = features.float().flatten(2).transpose(1, 2)
        sums = torch.cat([share @ flat, share.sum(dim=2, keepdim=True)], dim=2).sum(dim=0)
        self._sums = sums if self._sums is None else self._sums + sums
        return labels, steady, features.half()

    def settle(self) -> None:
        """The prototypes, from the sums of all ranks."""
        shares = [share for share in gather(None if self._sums is None else self._sums.cpu()) if share is not None]
        sums = torch.stack(shares).sum(dim=0).to(self._device)
        self.prototypes = sums[:, :-1] / sums[:, -1:]  # 0 / 0 for a class that never occurs

    def decide(self, labels: Tensor, steady: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and weights of a batch."""
        flat = features.float().flatten(2).transpose(1, 2)
        absent = self.prototypes.isnan().any(dim=1)
        distances = torch.cdist(flat, self.prototypes.nan_to_num().expand(len(flat), -1, -1)).transpose(1, 2)
        distances = resize_to(distances.unflatten(2, features.shape[2:]), labels)
        distances[:, absent] = torch.inf
        return labels, (steady & (distances.min(dim=1).indices == labels)).float()

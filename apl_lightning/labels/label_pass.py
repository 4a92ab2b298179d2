"""One pass over the target images: predict, denoise, write."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from apl_lightning._support.distributed import all_or_none
from apl_lightning._support.seeding import derived_seed
from apl_lightning._support.soft_labels import hard_labels
from apl_lightning.data import check_fingerprint
from apl_lightning.denoisers import DatasetDenoiser, Denoiser
from apl_lightning.labels.spool import Spool
from apl_lightning.labels.statistics import LabelStatistics
from apl_lightning.labels.target_images import ImageBatch
from apl_lightning.store import PseudoLabelStore, RoundWriter

Predictions = Iterator[tuple[ImageBatch, tuple[Tensor, ...]]]


def predict(
    batches: Iterable[ImageBatch], run: Callable[[Tensor], tuple[Tensor, ...]], seed: int, num_classes: int
) -> Predictions:
    """Predict this rank's batches with `run`, which returns the probabilities of both heads first.

    Dropout draws from (seed, batch), so it does not depend on the rank. Another shape than that of the images is a
    `ValueError`, and so is NaN or infinity, which names the samples.
    """
    for batch in batches:
        torch.manual_seed(derived_seed(seed, batch.indices[0]))
        made = run(batch.images)
        _check_shapes(made[0], made[1], batch.images, num_classes)
        _check_predictions(made[0], made[1], batch)
        yield batch, made


class Recorder:
    """Checks labels and weights, writes them, and counts them and their changes since the round in the store."""

    def __init__(self, store: PseudoLabelStore, statistics: LabelStatistics) -> None:
        self._store = store
        self._statistics = statistics
        self._is_first_round = store.current is None

    def add(self, batch: ImageBatch, labels: Tensor, weights: Tensor, writer: RoundWriter) -> None:
        """Write and count the labels and weights of a batch; a `ValueError` if they do not match the images."""
        labels = labels.long() if labels.dtype == torch.bool else labels
        _check(labels, weights, batch, self._statistics.num_classes)
        labels, weights = labels.cpu(), weights.cpu()
        hard = hard_labels(labels, weights)
        self._statistics.add(hard, weights)
        for place, index in enumerate(batch.indices):
            writer.add(index, labels[place], weights[place], batch.cases[place], batch.fingerprints[place])
            if not self._is_first_round:
                check_fingerprint(batch.fingerprints[place], self._store.fingerprint(index), index)
                self._statistics.compare(hard[place], self._store.read(index).classes)
            reference = batch.references[place]
            if reference is not None:
                self._statistics.diagnose(hard[place], reference)


def make_labels(
    predictions: Predictions, denoiser: Denoiser, writing: Callable[[], RoundWriter], recorder: Recorder, spool: Spool
) -> None:
    """Denoise the predictions of this rank and record labels and weights; `writing` opens its file of the round.

    All ranks call it. Shares may be uneven: there is no collective before all ranks have finished theirs.
    """
    if not isinstance(denoiser, DatasetDenoiser):
        with all_or_none("Making pseudo labels"), writing() as writer:
            for batch, made in predictions:
                recorder.add(batch, *denoiser(*made), writer)
        return
    with all_or_none("Predicting the target images"):
        for batch, made in predictions:
            spool.put(batch, denoiser.observe(*made))
    denoiser.settle()
    with all_or_none("Making pseudo labels"), writing() as writer:
        for batch, observed in spool:
            recorder.add(batch, *denoiser.decide(*observed), writer)


def _check(labels: Tensor, weights: Tensor, batch: ImageBatch, classes: int) -> None:
    shape = batch.images.shape[:1] + batch.images.shape[2:]
    soft = (*shape[:1], classes, *shape[1:])
    expected = soft if labels.is_floating_point() else shape
    if labels.shape != expected or weights.shape != shape:
        raise ValueError(
            f"Expected integer labels and weights of shape {tuple(shape)}, or soft labels of shape {tuple(soft)}, for "
            f"images of shape {tuple(batch.images.shape)}, but got {labels.dtype} {tuple(labels.shape)} and "
            f"{tuple(weights.shape)}: check the denoiser."
        )
    for values in (labels, weights):
        if samples := _not_finite(values, batch):
            raise ValueError(
                f"Expected finite labels and weights, but the denoiser gave NaN for samples {samples}: check the "
                "denoiser."
            )
    low, high = (float(value) for value in labels.aminmax())
    if low < 0 or high > (1 if labels.is_floating_point() else classes - 1):
        raise ValueError(
            f"Expected pseudo labels between 0 and {classes - 1}, or soft labels between 0 and 1, but got values from "
            f"{low:g} to {high:g}: check the denoiser; a pixel is ignored by weight 0, not by its label."
        )


def _check_shapes(p_main: Tensor, p_aux: Tensor, images: Tensor, num_classes: int) -> None:
    expected = (len(images), num_classes, *images.shape[2:])
    if not p_main.shape == p_aux.shape == expected:
        raise ValueError(
            f"Expected predictions of both heads of shape {expected}, with a channel for each of `class_names`, "
            f"background included, but got {tuple(p_main.shape)} and {tuple(p_aux.shape)} for images "
            f"{tuple(images.shape)}: name all classes, and return logits at the size of the images."
        )


def _check_predictions(p_main: Tensor, p_aux: Tensor, batch: ImageBatch) -> None:
    if samples := _not_finite(p_main.sum(dim=1) + p_aux.sum(dim=1), batch):
        low, high = batch.images.aminmax()
        raise ValueError(
            f"Expected finite predictions, but the network gave NaN for samples {samples}; their batch has values from "
            f"{low:g} to {high:g}. If those are wrong, mend the images. If the first rounds went well, lower the "
            "learning rate, or use precision='bf16-mixed' instead of '16-mixed'."
        )


def _not_finite(values: Tensor, batch: ImageBatch) -> list[int]:
    """The samples of a batch with NaN or infinity in `values` (B, ...)."""
    finite = torch.isfinite(values).flatten(1).all(dim=1)
    if bool(finite.all()):
        return []
    return [index for index, good in zip(batch.indices, finite.tolist(), strict=True) if not good]

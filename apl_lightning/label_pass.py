"""One pass over the target images: predict, denoise, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from apl_lightning.denoisers import APL, DatasetDenoiser, Denoiser, hard_labels
from apl_lightning.predictor import Predictor
from apl_lightning.randomness import derived_seed
from apl_lightning.ranks import together
from apl_lightning.round_files import RoundWriter
from apl_lightning.statistics import RoundStatistics
from apl_lightning.store import PseudoLabelStore
from apl_lightning.target_images import ImageBatch


def make_labels(
    batches: Iterable[ImageBatch],
    predictor: Predictor,
    denoiser: Denoiser,
    writing: Callable[[], RoundWriter],
    record: Recorder,
    spool: Spool,
    seed: int,
) -> None:
    """Predict and denoise this rank's batches, write the labels and count them.

    Shares may be uneven: there is no collective until all ranks are through theirs. Call it on all of them, in
    evaluation mode and without gradients.

    Args:
        batches: This rank's images.
        predictor: Asks the network.
        denoiser: Decides.
        writing: Opens this rank's file of the round.
        record: Checks, writes and counts.
        spool: Keeps what a `DatasetDenoiser` will need.
        seed: What dropout draws in a batch depends on it and on the batch, not on the rank.

    Raises:
        ValueError: If the network or the denoiser gives NaN (the message names the samples), or the shapes do not fit.
    """
    predict = getattr(denoiser, "predict", Predictor.__call__)

    def predictions() -> Iterator[tuple[ImageBatch, tuple[Tensor, ...]]]:
        for batch in batches:
            torch.manual_seed(derived_seed(seed, batch.indices[0]))
            made = predict(predictor, batch.images)
            record.see(batch, *made[:2])
            yield batch, made

    if not isinstance(denoiser, DatasetDenoiser):
        with together("Making pseudo labels"), writing() as writer:
            for batch, made in predictions():
                record.add(batch, *denoiser(*made), writer)
        return
    with together("Predicting the target images"):
        for batch, made in predictions():
            spool.put(batch, denoiser.observe(*made))
    denoiser.settle()
    with together("Making pseudo labels"), writing() as writer:
        for batch, observed in spool:
            record.add(batch, *denoiser.decide(*observed), writer)


def measure(batches: Iterable[ImageBatch], predictor: Predictor, statistics: RoundStatistics) -> None:
    """Count what the network predicts, as a round of it would begin, without making labels."""
    with together("Measuring the network on the target images"):
        for batch in batches:
            p_main, p_aux = predictor(batch.images)
            statistics.see(p_main, p_aux)
            labels, weights = APL()(p_main, p_aux)
            statistics.add(labels.cpu(), weights.cpu())


class Spool:
    """What a denoiser keeps of each batch until it has seen all of them: in memory, and in files where that is full.

    Args:
        folder: Where the files are; each is read once, then gone.
        rank: Whose they are.
        device: Where the tensors shall come back.
        memory: Bytes that may stay in memory.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, memory: int = 2**29) -> None:
        self._folder = folder
        self._rank = rank
        self._device = device
        self._memory = memory
        self._batches: list[tuple[ImageBatch, list[Tensor]] | Path] = []

    def put(self, batch: ImageBatch, observed: tuple[Tensor, ...]) -> None:
        """Keep a batch without its images."""
        without_images = batch._replace(images=batch.images.new_empty(batch.images.shape, device="meta"))
        kept = [tensor.cpu() for tensor in observed]
        self._memory -= sum(tensor.nbytes for tensor in (*kept, *batch.references) if tensor is not None)
        if self._memory >= 0:
            self._batches.append((without_images, kept))
            return
        path = self._folder / f"spool-{self._rank:05d}-{len(self._batches):06d}.pt"
        torch.save((without_images._asdict(), kept), path)
        self._batches.append(path)

    def __iter__(self) -> Iterator[tuple[ImageBatch, list[Tensor]]]:
        for entry in self._batches:
            if isinstance(entry, Path):
                fields, kept = torch.load(entry, weights_only=True)
                entry.unlink()
                entry = ImageBatch(**fields), kept
            batch, kept = entry
            yield batch, [tensor.to(self._device) for tensor in kept]


class Recorder:
    """Checks labels and weights, writes them and counts them.

    Args:
        store: Holds the round before.
        statistics: Counts.
    """

    def __init__(self, store: PseudoLabelStore, statistics: RoundStatistics) -> None:
        self._store = store
        self._statistics = statistics
        self._is_first_round = store.current is None

    def see(self, batch: ImageBatch, p_main: Tensor, p_aux: Tensor) -> None:
        """Count what both heads predict for a batch, (B, C, *S) each.

        Raises:
            ValueError: If it is not finite.
        """
        _check_finite(p_main.sum(dim=1) + p_aux.sum(dim=1), batch)
        self._statistics.see(p_main, p_aux)

    def add(self, batch: ImageBatch, labels: Tensor, weights: Tensor, writer: RoundWriter) -> None:
        """Write and count the labels and weights of a batch.

        Raises:
            ValueError: If they do not fit the images.
        """
        _check(labels, weights, batch, self._statistics.num_classes)
        labels, weights = labels.cpu(), weights.cpu()
        hard = hard_labels(labels, weights)
        self._statistics.add(hard, weights)
        for place, index in enumerate(batch.indices):
            writer.add(index, labels[place], weights[place], batch.cases[place])
            if not self._is_first_round:
                self._statistics.compare(hard[place], self._store.read(index).classes)
            reference = batch.references[place]
            if reference is not None:
                self._statistics.diagnose(hard[place], reference)


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
    _check_finite(weights, batch)
    low, high = (float(value) for value in labels.aminmax())
    if low < 0 or high > (1 if labels.is_floating_point() else classes - 1):
        raise ValueError(
            f"Expected pseudo labels between 0 and {classes - 1}, or soft ones between 0 and 1, but got values from "
            f"{low:g} to {high:g}: check the denoiser; a pixel is ignored by weight 0, not by its label."
        )


def _check_finite(values: Tensor, batch: ImageBatch) -> None:
    finite = torch.isfinite(values).flatten(1).all(dim=1)
    if not bool(finite.all()):
        samples = [index for index, good in zip(batch.indices, finite.tolist(), strict=True) if not good]
        raise ValueError(
            f"Expected finite predictions, but the network gave NaN for samples {samples}: lower the learning rate, "
            "or use precision='bf16-mixed' instead of '16-mixed'."
        )

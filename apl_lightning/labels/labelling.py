"""What a rank does with the target images: prepare the network, label its share, measure the network."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from apl_lightning._support.distributed import all_or_none
from apl_lightning._support.lightning import LightningModule, Trainer, autocast
from apl_lightning._support.modes import evaluating
from apl_lightning._support.progress import track
from apl_lightning._support.seeding import derived_seed, seeded
from apl_lightning.data import EpochSampler, RandomPatches, TargetDataset
from apl_lightning.denoisers import Denoiser, Predictor
from apl_lightning.guard import Classes, PixelSample, careful_gain
from apl_lightning.heads import Inferer
from apl_lightning.labels.label_pass import Predictions, Recorder, make_labels, predict
from apl_lightning.labels.spool import Spool
from apl_lightning.labels.statistics import LabelStatistics
from apl_lightning.labels.target_images import TargetImages

GAIN = "pseudo/estimated_gain"
CAREFUL_GAIN = "pseudo/careful_gain"  # by which the guard chooses a candidate


class Labelling:
    """The work of one round on one rank, for a trainer that trains on a `TargetDataset`."""

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        sample: PixelSample | None,
        inferer: Inferer | None,
        batch_size: int | None,
    ) -> None:
        self.dataset = target_dataset(trainer)
        self.local_rank = trainer.local_rank
        self.module = module
        self.sample = sample
        self._trainer = trainer
        self._names: list[str] = module.class_names  # type: ignore[assignment]
        self.num_classes = len(self._names)
        self._ignore_index = getattr(module, "ignore_index", None)
        inferer = inferer or getattr(module, "inferer", None)
        self._predictor = Predictor(module, inferer, partial(autocast, trainer))
        self._batch_size = batch_size or predicted_at_once(self.dataset.size, module.device)
        # BatchNorm statistics need large batches.
        self._prepared_at_once = batch_size or _largest_batch(self.dataset.size)

    def prepare(self) -> None:
        """Let the module prepare itself on all images, as by BatchNorm statistics."""
        self._over_images(getattr(self.module, "prepare_refinement", None), patches=None)

    def warm_up(self) -> None:
        """Let the module fit a new second head on all images or their patches, with the chosen BatchNorm statistics."""
        self._over_images(getattr(self.module, "warm_up", None), self.dataset.patches)

    def _over_images(self, prepare: Callable[[Any], object] | None, patches: RandomPatches | None) -> None:
        if prepare is None:
            return
        # Each rank reads all images in the same shuffled order, so the result does not depend on the number of ranks.
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0)).tolist()
        images = TargetImages(self._trainer, self.dataset, self._prepared_at_once, order)
        with all_or_none("Preparing the network on the target images"), autocast(self._trainer):
            prepare(_Images(images, self._trainer, patches))

    def label(self, denoiser: Denoiser, round: int, seed: int) -> tuple[dict[str, float], Classes]:
        """Label this rank's share; returns the statistics for the log over all ranks, and what the network predicts."""
        store, rank = self.dataset.store, self._trainer.global_rank
        statistics = LabelStatistics(self._names, self._ignore_index)
        denoiser.begin(round, self.num_classes, self.module.device)
        classes: Classes = {}
        with evaluating(self.module), torch.no_grad():
            predictions = self._predictions(
                partial(denoiser.predict, self._predictor), seed, f"Pseudo labels, round {round}"
            )
            make_labels(
                self._watched(predictions, classes, statistics),
                denoiser,
                partial(store.write, round, self.num_classes, rank),
                Recorder(store, statistics),
                Spool(store.folder(round), rank, self.module.device),
            )
        return statistics.compute(self.module.device), classes

    def look(self, seed: int) -> Classes:
        """What the main head of the network, as it is, predicts at the sampled pixels of this rank's images."""
        classes: Classes = {}
        with evaluating(self.module), torch.no_grad(), all_or_none("Predicting the target images"):
            for _ in self._watched(self._predictions(self._predictor, seed, "Predicting"), classes):
                pass
        return classes

    def gains(self, before: Classes, after: Classes) -> dict[str, float]:
        """The mean and the careful gain of Dice by estimate, and that of each class, by their names in the log."""
        assert self.sample is not None
        gains = self.sample.gains(before, after, self.num_classes)
        named = zip(self._names[1:], gains, strict=True)
        by_class = {f"{GAIN}/{name}": gain for name, gain in named if not math.isnan(gain)}
        found = list(by_class.values())
        return {GAIN: fmean(found or [0.0]), CAREFUL_GAIN: careful_gain(found), **by_class}

    def _predictions(self, run: Callable[[Tensor], tuple[Tensor, ...]], seed: int, description: str) -> Predictions:
        share = TargetImages(self._trainer, self.dataset, self._batch_size)
        return predict(track(self._trainer, share, description, len(share)), run, seed, self.num_classes)

    def _watched(
        self, predictions: Predictions, classes: Classes, statistics: LabelStatistics | None = None
    ) -> Predictions:
        """Keep what the main head predicts at the sampled pixels, and count the agreement of both heads."""
        for batch, made in predictions:
            labels = made[0].max(dim=1).indices
            if self.sample is not None:
                classes |= self.sample.look(batch.indices, batch.cases, batch.images, labels)
            if statistics is not None and made[1] is not made[0]:  # else the denoiser has merged both heads
                statistics.agree(labels, made[1].max(dim=1).indices)
            yield batch, made


class _Images:
    """Only the images of `TargetImages`, or patches of them, under a progress bar."""

    def __init__(self, source: TargetImages, trainer: Trainer, patches: RandomPatches | None) -> None:
        self._source = source
        self._trainer = trainer
        self._patches = patches
        self._passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in track(self._trainer, self._source, "Preparing", len(self._source)):
            images = batch.images
            if self._patches is not None:
                with seeded(derived_seed(self._passes, batch.indices[0]), self._patches):  # the same on every rank
                    images = self._patches.patches_of(images)
            yield images
        self._passes += 1


def predicted_at_once(size: Sequence[int], device: torch.device) -> int:
    """How many images of spatial size (*S) a label pass predicts at once: 1 volume, or 16 slices.

    On a CPU at most as many slices as have 2^17 pixels: batches of two 256 x 256 slices take a third less time a slice.
    """
    most = _largest_batch(size)
    return min(most, max(1, 2**17 // math.prod(size))) if device.type == "cpu" else most


def _largest_batch(size: Sequence[int]) -> int:
    return 16 if len(size) <= 2 else 1


def target_dataset(trainer: Trainer) -> TargetDataset:
    """The target images that the trainer trains on; a `TypeError` if it trains on anything else."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if not isinstance(dataset, TargetDataset):
        raise TypeError(
            f"Expected the training loader to read a TargetDataset, but it reads {type(dataset).__name__}: pass the "
            "trainer a `TargetDataModule`, or `TargetDataModule.from_datamodule(yours)`."
        )
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if isinstance(sampler, EpochSampler) and sampler.num_replicas != trainer.world_size:
        raise ValueError(
            f"Expected the samples of {trainer.world_size} processes, but the training loader was made for "
            f"{sampler.num_replicas}: pass the trainer the `TargetDataModule`, not its loader."
        )
    return dataset

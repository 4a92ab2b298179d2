"""What a rank does with the target images: prepare the network, label its share, measure the network."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apl_lightning._support.distributed import all_or_none, once_per_node
from apl_lightning._support.lightning import LightningModule, Trainer, autocast
from apl_lightning._support.modes import evaluating
from apl_lightning._support.progress import track
from apl_lightning.data import TargetDataset
from apl_lightning.denoisers import Denoiser, Predictor
from apl_lightning.guard import UnsupervisedScores
from apl_lightning.heads import Inferer
from apl_lightning.labels.label_pass import Predictions, Recorder, make_labels, predict
from apl_lightning.labels.small_components import find_small_components
from apl_lightning.labels.spool import Spool
from apl_lightning.labels.statistics import LabelStatistics
from apl_lightning.labels.target_images import TargetImages


class Labelling:
    """The work of one round on one rank, for a trainer that trains on a `TargetDataset`."""

    def __init__(
        self, trainer: Trainer, module: LightningModule, inferer: Inferer | None, batch_size: int | None
    ) -> None:
        self.dataset = target_dataset(trainer)
        self._trainer = trainer
        self._module = module
        self._names: Any = module.class_names
        self._ignore_index = getattr(module, "ignore_index", None)
        inferer = inferer or getattr(module, "inferer", None)
        self._predictor = Predictor(module, inferer, partial(autocast, trainer))
        self._batch_size = batch_size or predicted_at_once(self.dataset.size, module.device)
        # BatchNorm statistics need large batches.
        self._prepared_at_once = batch_size or _largest_batch(self.dataset.size)

    def prepare(self) -> None:
        """Let the module prepare itself on all images: BatchNorm statistics, a new second head."""
        prepare = getattr(self._module, "prepare_refinement", None)
        if prepare is None:
            return
        # Each rank reads all images in the same shuffled order, so the result does not depend on the number of ranks.
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0)).tolist()
        images = TargetImages(self._trainer, self.dataset, self._prepared_at_once, order)
        with autocast(self._trainer):
            prepare(_Images(images, self._trainer))

    def label(self, denoiser: Denoiser, round: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
        """Label this rank's share; returns the statistics for the log and the scores of the network, over all ranks."""
        store, rank = self.dataset.store, self._trainer.global_rank
        statistics, scores = LabelStatistics(self._names, self._ignore_index), UnsupervisedScores(self._names)
        denoiser.begin(round, statistics.num_classes, self._module.device)
        with evaluating(self._module), torch.no_grad():
            make_labels(
                self._predictions(denoiser, scores, seed, f"Pseudo labels, round {round}"),
                denoiser,
                partial(store.write, round, statistics.num_classes, rank),
                Recorder(store, statistics),
                Spool(store.folder(round), rank, self._module.device),
            )
        computed = scores.compute(self._module.device)
        return computed | statistics.compute(self._module.device), computed

    def measure(self, denoiser: Denoiser, seed: int) -> dict[str, float]:
        """The scores of the network as it is, over all ranks, without making labels."""
        scores = UnsupervisedScores(self._names)
        with evaluating(self._module), torch.no_grad(), all_or_none("Measuring the network on the target images"):
            for _ in self._predictions(denoiser, scores, seed, "Measuring"):
                pass
        return scores.compute(self._module.device)

    def ignore_small_components(self, round: int, largest_component_share: float) -> dict[str, float]:
        """Set the weights of small components to 0; returns the share of the foreground's weight in them."""
        reader = self.dataset.store.reader(round)
        small = find_small_components(reader, len(self._names), largest_component_share)
        once_per_node(self._trainer.local_rank, "Ignoring small components", lambda: reader.ignore(small.pixels))
        return {"pseudo/apart": small.share}

    def _predictions(self, denoiser: Denoiser, scores: UnsupervisedScores, seed: int, description: str) -> Predictions:
        share = TargetImages(self._trainer, self.dataset, self._batch_size)
        batches = track(self._trainer, share, description, len(share))
        return predict(batches, self._predictor, denoiser, scores, seed)


class _Images:
    """Only the images of `TargetImages`, under a progress bar."""

    def __init__(self, source: TargetImages, trainer: Trainer) -> None:
        self._source = source
        self._trainer = trainer

    def __iter__(self) -> Iterator[Tensor]:
        for batch in track(self._trainer, self._source, "Preparing", len(self._source)):
            yield batch.images


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
    return dataset

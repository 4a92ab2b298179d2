"""This rank's work on the target images: prepare the network, label them, measure it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apl_lightning._lightning import LightningModule, Trainer
from apl_lightning.components import small_components
from apl_lightning.dataset import TargetDataset
from apl_lightning.denoisers import Denoiser
from apl_lightning.dual import Inferer
from apl_lightning.label_pass import Recorder, Spool, make_labels, measure
from apl_lightning.predictor import Predictor
from apl_lightning.probe import evaluating
from apl_lightning.progress import track
from apl_lightning.ranks import together
from apl_lightning.statistics import RoundStatistics
from apl_lightning.target_images import TargetImages


class Labelling:
    """What a round needs of the trainer, its network and its target images.

    Args:
        trainer: It trains on a `TargetDataset`.
        module: Gives the logits of both heads.
        inferer: Passes the images through it in its own way.
        batch_size: Images that are predicted at once; by default 1 volume, or 16 slices, on a CPU as many of them as
            have 2^17 pixels.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, inferer: Inferer | None, batch_size: int | None):
        self.dataset = target_dataset(trainer)
        self._trainer = trainer
        self._module = module
        self._predictor = Predictor(module, inferer, trainer.precision_plugin.forward_context)
        self._batch_size = batch_size or predicted_at_once(self.dataset.size, module.device)
        self._prepared_at_once = batch_size or _at_most(self.dataset.size)  # the statistics of BatchNorm want many

    def prepare(self) -> None:
        """Let the module prepare itself on all images: its BatchNorm statistics, a fresh second head."""
        prepare = getattr(self._module, "prepare_refinement", None)
        if prepare is None:
            return
        # Each rank sees all images in one shuffled order: the result is the same on all, whatever their number.
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0)).tolist()
        images = TargetImages(self.dataset, self._trainer, self._module, self._prepared_at_once, order=order)
        with self._trainer.precision_plugin.forward_context():
            prepare(_Images(images, self._trainer))

    def label(self, denoiser: Denoiser, round: int, seed: int) -> dict[str, float]:
        """Label this rank's share and write it to the store; returns the statistics of all ranks."""
        store, rank, statistics = self.dataset.store, self._trainer.global_rank, self._statistics()
        share = self._share()
        if callable(begin := getattr(denoiser, "begin", None)):
            begin(round, statistics.num_classes, self._module.device)
        with evaluating(self._module), torch.no_grad():
            make_labels(
                track(self._trainer, share, f"Pseudo labels, round {round}", len(share)),
                self._predictor,
                denoiser,
                partial(store.write, round, statistics.num_classes, rank),
                Recorder(store, statistics),
                Spool(store.folder(round), rank, self._module.device),
                seed,
            )
        return statistics.compute(self._module.device)

    def ignore_small_components(self, round: int) -> dict[str, float]:
        """Take the weight from what lies apart from the largest piece of its class in its volume; tells how much."""
        reader = self.dataset.store.reader(round)
        apart = small_components(reader, self._statistics().num_classes)
        with together("Taking the weight from small components"):
            if self._trainer.local_rank == 0:
                reader.ignore(apart.pixels)
        return {"pseudo/apart": apart.part}

    def measure(self) -> dict[str, float]:
        """The statistics of the network as it is, without labels."""
        share, statistics = self._share(), self._statistics()
        with evaluating(self._module), torch.no_grad():
            measure(track(self._trainer, share, "Measuring", len(share)), self._predictor, statistics)
        return statistics.compute(self._module.device)

    def _share(self) -> TargetImages:
        rank, world_size = self._trainer.global_rank, self._trainer.world_size
        return TargetImages(self.dataset, self._trainer, self._module, self._batch_size, rank, world_size)

    def _statistics(self) -> RoundStatistics:
        class_names: Any = self._module.class_names
        return RoundStatistics(class_names)


class _Images:
    """Only the images of `TargetImages`, under a progress bar."""

    def __init__(self, source: TargetImages, trainer: Trainer) -> None:
        self._source = source
        self._trainer = trainer

    def __iter__(self) -> Iterator[Tensor]:
        for batch in track(self._trainer, self._source, "Preparing", len(self._source)):
            yield batch.images


def predicted_at_once(size: Sequence[int], device: torch.device) -> int:
    """How many images of spatial size (*S) a label pass predicts at once.

    One volume, or 16 slices; on a CPU no more of them than have 2^17 pixels, for there two of 256 x 256 take a third
    less time each than 16.
    """
    most = _at_most(size)
    return min(most, max(1, 2**17 // math.prod(size))) if device.type == "cpu" else most


def _at_most(size: Sequence[int]) -> int:
    return 16 if len(size) <= 2 else 1


def target_dataset(trainer: Trainer) -> TargetDataset:
    """The target images that the trainer trains on.

    Raises:
        TypeError: If it trains on anything else.
    """
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if not isinstance(dataset, TargetDataset):
        raise TypeError(
            f"Expected the training loader to read a TargetDataset, but it reads {type(dataset).__name__}: pass the "
            "trainer a `TargetDataModule`, or `TargetDataModule.from_datamodule(yours)`."
        )
    return dataset

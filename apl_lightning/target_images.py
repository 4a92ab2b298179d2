"""The target images as they are, in batches that depend on nothing but the data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apl_lightning._lightning import LightningModule, Trainer
from apl_lightning.dataset import TargetDataset
from apl_lightning.preemption import raise_if_stopped


class ImageBatch(NamedTuple):
    """Images of one size, on the device: their indices, (B, C, *S), and reference labels and cases where known."""

    indices: list[int]
    images: Tensor
    references: list[Tensor | None]
    cases: list[str]


class TargetImages:
    """The untransformed target images in batches, as often as they are iterated over.

    Batches are cut from the whole data set before they are shared out, and their size is not that of training: what
    comes of them depends neither on the number of ranks nor on the batches that these train on.

    Args:
        dataset: The target images.
        trainer: Says how images get to the device, and how the training loader reads them.
        module: The module whose device they go to.
        batch_size: Images a batch.
        rank: Which rank's share.
        world_size: Number of shares; 1 gives all images.
        order: Indices in the order wanted; that of the data set by default.
    """

    def __init__(
        self,
        dataset: TargetDataset,
        trainer: Trainer,
        module: LightningModule,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        order: Sequence[int] | None = None,
    ) -> None:
        self._trainer = trainer
        self._to_device = lambda tensor: trainer.strategy.batch_to_device(tensor, module.device)
        training: Any = trainer.train_dataloader
        indices = range(len(dataset)) if order is None else order
        batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
        self.batches = batches[rank::world_size]
        self._loader = DataLoader(
            _Untransformed(dataset),
            batch_sampler=self.batches,
            num_workers=training.num_workers,
            pin_memory=training.pin_memory,
            collate_fn=list,
            # A loader draws a seed for its workers: from its own generator, so that training draws what it would have.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        for samples in self._loader:
            raise_if_stopped(self._trainer)
            while samples:
                shape = samples[0][1]["image"].shape
                alike = [sample for sample in samples if sample[1]["image"].shape == shape]
                samples = [sample for sample in samples if sample[1]["image"].shape != shape]
                images = torch.stack([sample["image"] for _, sample in alike])
                references = [sample.get("label") for _, sample in alike]
                cases = [sample.get("case", "") for _, sample in alike]
                yield ImageBatch([index for index, _ in alike], self._to_device(images), references, cases)


class _Untransformed(Dataset[Any]):
    def __init__(self, dataset: TargetDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.dataset.read_named(index)

"""The untransformed target images, in batches that depend on the data set alone."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apl_lightning._support.lightning import Trainer, to_device
from apl_lightning._support.preemption import raise_if_stopped
from apl_lightning.data import WORKER_OPTIONS, TargetDataset, fingerprint


class ImageBatch(NamedTuple):
    """Images of one size on the device, (B, C, *S), their indices and fingerprints, and labels and cases if known."""

    indices: list[int]
    images: Tensor
    references: list[Tensor | None]
    cases: list[str]
    fingerprints: list[Tensor]


class TargetImages:
    """This rank's share of the untransformed target images in batches or, with an `order`, all of them in that order.

    Can be iterated over repeatedly. Batches are cut from the whole data set and then shared out, and their size is not
    that of training. So results depend on neither the number of ranks nor the batch size of training.
    """

    def __init__(
        self, trainer: Trainer, dataset: TargetDataset, batch_size: int, order: Sequence[int] | None = None
    ) -> None:
        self._trainer = trainer
        training: Any = trainer.train_dataloader
        indices = range(len(dataset)) if order is None else order
        batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
        if order is not None and 1 == len(batches[-1]) < batch_size and len(batches) > 1:
            batches[-2:] = [batches[-2] + batches[-1]]  # BatchNorm after global pooling needs two images to learn from
        self.batches = batches[trainer.global_rank :: trainer.world_size] if order is None else batches
        self._loader = DataLoader(
            _Untransformed(dataset),
            batch_sampler=self.batches,
            num_workers=training.num_workers,
            persistent_workers=order is not None and training.num_workers > 0,  # preparation reads many times
            pin_memory=training.pin_memory,
            collate_fn=list,
            **{name: getattr(training, name) for name in WORKER_OPTIONS},
            # A loader draws a seed for its workers; the global generator must stay as it is for training.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        for number, samples in enumerate(self._loader):
            raise_if_stopped(self._trainer)
            while samples:
                shape = samples[0][1]["image"].shape
                alike = [sample for sample in samples if sample[1]["image"].shape == shape]
                samples = [sample for sample in samples if sample[1]["image"].shape != shape]
                images = torch.stack([sample["image"] for _, sample in alike])
                yield ImageBatch(
                    [index for index, _ in alike],
                    self._moved(images, checked=number == 0),
                    [_own(sample.get("label")) for _, sample in alike],
                    [sample.get("case", "") for _, sample in alike],
                    [_own(sample["fingerprint"]) for _, sample in alike],
                )

    def _moved(self, images: Tensor, checked: bool) -> Tensor:
        """The images as a training step gets them; if checked, a `ValueError` if a hook of a subclass is random."""
        again = images.clone() if checked else None  # a hook may work in place
        moved = to_device(self._trainer, {"image": images})["image"]
        if again is not None and not torch.equal(moved, to_device(self._trainer, {"image": again})["image"]):
            raise ValueError(
                "Expected the transfer hooks of your module or data module to be deterministic, but two calls gave "
                "different images, and pseudo labels would not fit: pass random transforms as `transform`, which "
                "moves image, pseudo label and weight together."
            )
        return moved


class _Untransformed(Dataset[Any]):
    def __init__(self, dataset: TargetDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        sample = {name: _own(value) for name, value in self.dataset.read(index).items()}
        return index, {**sample, "fingerprint": fingerprint(sample["image"])}


def _own(value: Any) -> Any:
    """A copy of a tensor that would keep more than itself: all of a larger one, or an open file of a worker."""
    if isinstance(value, Tensor) and (value.is_shared() or value.untyped_storage().nbytes() > value.nbytes):
        return value.clone()
    return value

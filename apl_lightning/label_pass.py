"""One pass over the target images: predict, denoise, write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apl_lightning._lightning import LightningModule, Trainer
from apl_lightning.dataset import TargetDataset
from apl_lightning.denoisers import Denoiser
from apl_lightning.dual import Inferer
from apl_lightning.preemption import raise_if_stopped
from apl_lightning.round_files import RoundWriter
from apl_lightning.statistics import RoundStatistics
from apl_lightning.store import PseudoLabelStore


class ImageBatch(NamedTuple):
    """Images of one size, on the device: their indices, (B, C, *S), and reference labels where there are any."""

    indices: list[int]
    images: Tensor
    references: list[Tensor | None]


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
                yield ImageBatch([index for index, _ in alike], self._to_device(images), references)


class _Untransformed(Dataset[Any]):
    def __init__(self, dataset: TargetDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.dataset.read_named(index)


def label_images(
    batches: Iterator[ImageBatch],
    module: LightningModule,
    denoiser: Denoiser,
    inferer: Inferer | None,
    store: PseudoLabelStore,
    writer: RoundWriter,
    statistics: RoundStatistics,
) -> None:
    """Predict and denoise each batch, write the result and count it. Call it in evaluation mode, without gradients.

    Raises:
        ValueError: If the network or the denoiser gives NaN (the message names the samples), or the shapes do not fit.
    """
    is_first_round = store.current is None
    for indices, images, references in batches:
        p_main, p_aux = _probabilities(module, images, inferer)
        labels, weights = denoiser(p_main, p_aux)
        _check(labels, weights, images, indices, p_main.shape[1])
        agree = p_main.max(dim=1).indices == p_aux.max(dim=1).indices
        labels, weights = labels.cpu(), weights.cpu()
        statistics.add(labels, weights, agree)
        for index, label, weight, reference in zip(indices, labels, weights, references, strict=True):
            writer.add(index, label, weight)
            if not is_first_round:
                statistics.compare(label, store.read(index).labels)
            if reference is not None:
                statistics.diagnose(label, reference)


def _probabilities(module: LightningModule, images: Tensor, inferer: Inferer | None) -> tuple[Tensor, Tensor]:
    """Softmax in float32: bfloat16 turns 0.9991 into 1."""
    main, aux = module(images) if inferer is None else inferer(images, module)
    return main.float().softmax(dim=1), aux.float().softmax(dim=1)


def _check(labels: Tensor, weights: Tensor, images: Tensor, indices: list[int], classes: int) -> None:
    if labels.shape != weights.shape or labels.shape != images.shape[:1] + images.shape[2:]:
        raise ValueError(
            f"Expected labels and weights of shape {tuple(images.shape[:1] + images.shape[2:])} for images of shape "
            f"{tuple(images.shape)}, but got {tuple(labels.shape)} and {tuple(weights.shape)}: check the denoiser."
        )
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"Expected pseudo labels between 0 and {classes - 1}, but got values from {low} to {high}: check the "
            "denoiser; a pixel is ignored by weight 0, not by its label."
        )
    finite = torch.isfinite(weights).flatten(1).all(dim=1)
    if not bool(finite.all()):
        samples = [index for index, good in zip(indices, finite.tolist(), strict=True) if not good]
        raise ValueError(
            f"Expected finite predictions, but the network gave NaN for samples {samples}: lower the learning rate, "
            "or use precision='bf16-mixed' instead of '16-mixed'."
        )

"""What an existing project does to its data: its loaders, its `collate_fn`, its transfer hooks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from apl_lightning.data.sample_format import Keys, describe, parts_of, split_batch

WORKER_OPTIONS = ("worker_init_fn", "multiprocessing_context", "prefetch_factor", "timeout")
_REPEATS = 8  # how often a hook is called twice


class CollatedDataset(Dataset[Any]):
    """Each sample as the `collate_fn` of a loader returns it, in a batch of its own."""

    def __init__(self, dataset: Dataset[Any], collate_fn: Callable[..., Any], keys: Keys) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.keys = keys

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, cases = split_batch(self.collate_fn([self.dataset[index]]), self.keys)
        if len(image) != 1:
            raise ValueError(
                f"Expected the `collate_fn` of the loader to make one image of sample {index}, but got {len(image)}: "
                "take random crops out of the data set and pass them as `transform`."
            )
        sample = {self.keys.image: image[0]}
        if label is not None:
            sample[self.keys.label] = label[0]
        return sample if cases is None else {**sample, self.keys.case: cases[0]}


def read_loader(loader: object, owner: str, keys: Keys, trains: bool) -> tuple[Any, dict[str, Any]]:
    """The data set of a loader and its arguments; `owner` names the method that returned it.

    Raises:
        TypeError: If it is not one `DataLoader`.
        ValueError: If it does more than a `TargetDataModule` can.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"Expected {owner} to return one DataLoader, but got {describe(loader)}: build a `TargetDataModule` from "
            "its data sets; several become one by `torch.utils.data.ConcatDataset`."
        )
    if type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"Expected {owner} to make batches of a `batch_size`, but got {type(loader.batch_sampler).__name__}: build "
            "a `TargetDataModule` from its data sets."
        )
    if loader.drop_last and not trains:
        raise ValueError(f"Expected {owner} to read every image, but got drop_last=True: pass drop_last=False there.")
    dataset = _chosen(loader, owner)
    if loader.collate_fn is not default_collate:
        dataset = CollatedDataset(dataset, loader.collate_fn, keys)
    names = ["batch_size", "num_workers", "pin_memory", "drop_last", *WORKER_OPTIONS]
    return dataset, {name: getattr(loader, name) for name in names}


def _chosen(loader: DataLoader[Any], owner: str) -> Any:
    """The data set of a loader, cut to the images that its sampler chooses."""
    sampler: Any = loader.sampler
    if type(sampler) is SubsetRandomSampler:
        return Subset(loader.dataset, list(sampler.indices))
    every = type(sampler) in (SequentialSampler, DistributedSampler)
    if every or (type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None):
        return loader.dataset
    raise ValueError(
        f"Expected {owner} to read every image once, but got {describe(sampler)}: choose images with a "
        "`torch.utils.data.Subset`."
    )


class TransferHooks:
    """Runs the transfer hooks of a project on the images of one of its loaders, in a batch of the project's own form.

    Args:
        hooks: The hooks of the project by name.
        example: A batch of the loader.
        keys: The keys of image and label in it.
    """

    def __init__(self, hooks: Mapping[str, Callable[..., Any]], example: object, keys: Keys) -> None:
        self._hooks = hooks
        self._form = (
            "dict" if isinstance(example, Mapping) else "pair" if isinstance(example, tuple | list) else "image"
        )
        self._label = parts_of(example, keys).get("label")
        self._keys = keys.of(example) if isinstance(example, Mapping) else keys
        self._repeats = dict.fromkeys(hooks, _REPEATS)

    def __call__(self, name: str, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """A batch of ours after the hook.

        Raises:
            RuntimeError: If the hook needs more than image and label.
            ValueError: If it is random, returns NaN, or changes the size of the images.
        """
        if name not in self._hooks:
            return batch
        image, label = self._run(name, batch, dataloader_idx)
        what = f"Expected `{name}` of your data module to"
        if image.shape[2:] != batch["image"].shape[2:] or len(image) != len(batch["image"]):
            raise ValueError(
                f"{what} keep the size of images, but it changed {tuple(batch['image'].shape)} to "
                f"{tuple(image.shape)}: resize them in the data set."
            )
        if self._repeats[name]:
            self._repeats[name] -= 1
            if not bool(torch.isfinite(image).all()):
                raise ValueError(f"{what} return finite images, but got NaN or infinity: it may divide by 0.")
            if not torch.equal(self._run(name, batch, dataloader_idx)[0], image):
                raise ValueError(
                    f"{what} be deterministic, but two calls gave different images, and pseudo labels would not fit: "
                    "keep the normalisation there, and pass random transforms as `transform`, which moves image, "
                    "pseudo label and weight together."
                )
        return {**batch, "image": image, **({"label": label} if "label" in batch and label is not None else {})}

    def _run(self, name: str, batch: dict[str, Any], dataloader_idx: int) -> tuple[Tensor, Tensor | None]:
        ours = self._as_theirs(batch["image"].clone(), batch.get("label"))
        try:
            theirs = self._hooks[name](ours, dataloader_idx)
        except Exception as error:  # the project's code
            raise RuntimeError(
                f"Expected `{name}` of your data module to need image and label alone, but it raised "
                f"{type(error).__name__}: {error}. The batch has nothing else: make it skip other keys."
            ) from error
        image, label, _ = split_batch(theirs, self._keys)
        return image, label

    def _as_theirs(self, image: Tensor, label: Tensor | None) -> Any:
        if self._label is not None:
            label = _background(image) if label is None else label.clone()
            label = label[:, None] if self._label.ndim == image.ndim and label.ndim < image.ndim else label
            label = label.to(self._label.dtype)
        if self._form == "image":
            return image
        named = {self._keys.image: image, **({} if label is None else {self._keys.label: label})}
        return named if self._form == "dict" else list(named.values())


def _background(image: Tensor) -> Tensor:
    """Labels that a hook may expect; nothing that trains may read the real ones."""
    return image.new_zeros(len(image), *image.shape[2:], dtype=torch.long)

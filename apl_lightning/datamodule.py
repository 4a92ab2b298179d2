"""The loaders of a refinement run: target images for training, labelled images for validation."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, default_collate

from apl_lightning._lightning import LightningDataModule
from apl_lightning.augment import RandomAffine
from apl_lightning.dataset import LabelledDataset, TargetDataset
from apl_lightning.randomness import run_seed
from apl_lightning.sampler import EpochSampler
from apl_lightning.samples import Keys
from apl_lightning.store import PseudoLabelStore
from apl_lightning.transforms import TARGET_KEYS, Transform


class LazyDataLoader(DataLoader[Any]):
    """A loader whose workers start at the first batch asked for, not when its iterator is made.

    Lightning makes the iterator before `on_train_start`; workers would then have fetched samples with the labels of
    the round before. Lightning takes it as resumable in the middle of an epoch, which an `EpochSampler` makes true.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer knows how many batches it has had."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def collate(samples: list[Any]) -> Any:
    """Stack samples; a transform that draws several patches gives a list of them.

    `round` stays a list of integers: to compare it must not wait for a GPU.

    Raises:
        ValueError: If the images differ in size.
    """
    items = [item for sample in samples for item in (sample if isinstance(sample, list) else [sample])]
    if len(shapes := {tuple(item["image"].shape) for item in items}) > 1:
        raise ValueError(
            f"Expected images of one size in a batch, but got {sorted(shapes)}: pass batch_size=1, or a `transform` "
            f"that crops or pads {', '.join(TARGET_KEYS)}."
        )
    rounds = [item["round"] for item in items]
    return {**default_collate([{key: item[key] for key in item if key != "round"} for item in items]), "round": rounds}


class TargetDataModule(LightningDataModule):
    """Target images for refinement and, where there are any, labelled images for validation.

    Args:
        train: The unlabelled target images, a map-style data set (see [`TargetDataset`][apl_lightning.TargetDataset]).
        val: Labelled images for the Dice; `None` to train without.
        batch_size: Samples a batch and process.
        num_workers: Worker processes of each loader; they persist.
        transform: The joint transform of image, pseudo label and weight; `None` for none.
        store_dir: Where each run makes a folder for its labels; by default `pseudo_labels` in the trainer's root.
        val_batch_size: As `batch_size` by default; 1 where validation images differ in size.
        pin_memory: As in `DataLoader`.
        image_key: The key of the image in dictionaries.
        label_key: The key of the label in dictionaries.
        case_key: The key of the case (patient) in dictionaries; all slices of a case make one Dice, and in the target
            images one volume (see [`small_components`][apl_lightning.components.small_components]).

    Examples:
        >>> import torch
        >>> from apl_lightning import TargetDataModule
        >>> images = [torch.rand(1, 32, 32) for _ in range(4)]
        >>> data = TargetDataModule(train=images, batch_size=2)
    """

    def __init__(
        self,
        train: Any,
        val: Any = None,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        transform: Transform | None = RandomAffine(),  # noqa: B008 - it is immutable
        store_dir: str | Path | None = None,
        val_batch_size: int | None = None,
        pin_memory: bool = False,
        image_key: str = "image",
        label_key: str = "label",
        case_key: str = "case",
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.transform = transform
        self.store_dir = store_dir
        self.keys = Keys(image_key, label_key, case_key)
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._target: TargetDataset | None = None

    @staticmethod
    def from_datamodule(existing: LightningDataModule, **options: Any) -> TargetDataModule:
        """Wrap the data module of an existing project.

        Args:
            existing: Its training data set gives the target images and its validation data set the Dice; its batch
                size, workers and pinning are taken over. Labels in its training samples train nothing.
            options: Arguments of [`TargetDataModule`][apl_lightning.TargetDataModule] that shall differ.
        """
        return _AdoptedDataModule(existing, options)

    @property
    def train_dataset(self) -> TargetDataset:
        """The target images with their pseudo labels, after `setup("fit")`."""
        if self._target is None:
            raise RuntimeError("Expected `setup('fit')` first: the trainer calls it, or you do.")
        return self._target

    def setup(self, stage: str) -> None:
        if stage == "fit":
            directory, seed = self._run_directory(), run_seed(self.trainer)
            image, label, case = self.keys.image, self.keys.label, self.keys.case
            self._target = TargetDataset(self.train, directory, self.transform, image, label, case, seed)
        if self.val is not None:
            # Lightning takes an overridden hook as a promise of data, and warns about an empty list.
            self.val_dataloader = self._val_dataloader  # type: ignore[method-assign]

    def train_dataloader(self) -> LazyDataLoader:
        dataset, trainer = self.train_dataset, self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        sampler = EpochSampler(dataset, world_size, rank, dataset.seed, self._samples_done)
        return LazyDataLoader(dataset, sampler=sampler, collate_fn=collate, **self._options(self.batch_size))

    def state_dict(self) -> dict[str, Any]:
        if self._target is None:
            return {}
        return {"directory": str(self._target.store.directory), "seed": self._target.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the seed and the store of the interrupted run, where it still is."""
        if self._target is None or not state_dict:
            return
        self._target.seed = state_dict["seed"]
        store, saved = self._target.store, Path(state_dict["directory"])
        # Another node may keep the run under another root.
        for directory in (store.directory.with_name(saved.name), saved):
            if directory.is_dir():
                self._target.store = PseudoLabelStore(directory, store.length, store.identity)
                break

    def _samples_done(self) -> int:
        """What this rank has had of the current epoch, when its first batch is asked for."""
        if self.trainer is None:
            return 0
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready) * self.batch_size

    def _val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(LabelledDataset(self.val, self.keys), **self._options(self.val_batch_size))

    def _options(self, batch_size: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
        }

    def _run_directory(self) -> Path:
        """A folder for this run, the same on all ranks and no other run's."""
        name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}"
        root = self.store_dir
        if self.trainer is not None:
            name = self.trainer.strategy.broadcast(name)
            root = root or Path(self.trainer.default_root_dir) / "pseudo_labels"
        return Path(root or "pseudo_labels").absolute() / name


class _AdoptedDataModule(TargetDataModule):
    """The data sets of another data module, which exist only after its own setup."""

    def __init__(self, existing: LightningDataModule, options: dict[str, Any]) -> None:
        super().__init__(None, **options)
        self._existing = existing
        self._fixed = set(options)

    def prepare_data(self) -> None:
        self._existing.prepare_data()

    def setup(self, stage: str) -> None:
        self._existing.trainer = self.trainer
        self._existing.setup(stage)
        if stage == "fit":
            self._adopt("train", "train_dataloader", "batch_size")
        if stage in ("fit", "validate"):
            self._adopt("val", "val_dataloader", "val_batch_size")
        super().setup(stage)

    def teardown(self, stage: str) -> None:
        self._existing.teardown(stage)

    def _adopt(self, name: str, method: str, batch_size: str) -> None:
        if getattr(type(self._existing), method) is getattr(LightningDataModule, method):
            return
        loader = getattr(self._existing, method)()
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"Expected `{method}` of {type(self._existing).__name__} to return one DataLoader, but got "
                f"{type(loader).__name__}: build a `TargetDataModule` from its data sets."
            )
        found = {name: loader.dataset, batch_size: loader.batch_size, "num_workers": loader.num_workers}
        found["pin_memory"] = loader.pin_memory
        for attribute, value in found.items():
            if attribute not in self._fixed:
                setattr(self, attribute, value)

"""The loaders of a refinement run: target images for training, labelled images for validation and test."""

import secrets
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch.utils.data import DataLoader, Dataset, Subset

from apl_lightning._support.distributed import broadcast, refuse_left_over_group
from apl_lightning._support.lightning import (
    LightningDataModule,
    Trainer,
    batches_started,
)
from apl_lightning._support.lightning_package import overrides, package_of, refuse_pairing, require_lightning
from apl_lightning._support.seeding import run_seed
from apl_lightning.data.dataset import EvaluationDataset, TargetDataset
from apl_lightning.data.joint_transforms import Transform
from apl_lightning.data.loader import LazyDataLoader, collate, collate_evaluated
from apl_lightning.data.project import WORKER_OPTIONS
from apl_lightning.data.random_affine import RandomAffine
from apl_lightning.data.random_patches import RandomPatches
from apl_lightning.data.sample_format import Keys
from apl_lightning.data.sampler import EpochSampler
from apl_lightning.store import PseudoLabelStore


class TargetDataModule(LightningDataModule):
    """Target images for refinement and, optionally, labelled images for validation and test.

    Args:
        train: The unlabelled target images, a map-style data set (see [`TargetDataset`][apl_lightning.TargetDataset]);
            not needed for test and prediction.
        val: Labelled images for the Dice during training; `None` to train without.
        batch_size: Samples per batch and process.
        num_workers: Worker processes of each loader; they are persistent.
        transform: The joint transform of image, pseudo label and weight: `"affine"` is
            [`RandomAffine()`][apl_lightning.RandomAffine], `None` is none.
        store_dir: Each run creates a folder for its labels here; by default in `pseudo_labels` below the trainer's
            root directory.
        val_batch_size: Samples per batch in validation, test and prediction, `batch_size` by default, or 1 with a
            `patch_size`. Pass 1 if these images differ in size.
        pin_memory: As in `DataLoader`.
        image_key: The key of the image in dictionaries; if they lack it, Hugging Face's `pixel_values` is found.
        label_key: The key of the label in dictionaries; likewise `labels`, beside `pixel_values`.
        case_key: The key of the case (patient) in dictionaries. All slices of a case make one Dice, and one volume of
            target images (see [`find_small_components`][apl_lightning.labels.find_small_components]).
        test: Labelled images for `trainer.test`.
        predict: Images for `trainer.predict`, with or without labels.
        patch_size: Train on random patches of this spatial size (see
            [`RandomPatches`][apl_lightning.data.RandomPatches]); labels, validation, test and prediction see whole
            images by a [`sliding_window`][apl_lightning.data.sliding_window] of this size, unless the module has an
            `inferer`.
        patches_per_volume: Patches of each image that is read; a batch has `batch_size * patches_per_volume`.
        steps_per_epoch: Training batches per process and epoch, however many images there are; by default one pass
            over the images.

    Examples:
        >>> import torch
        >>> from apl_lightning import TargetDataModule
        >>> images = [torch.rand(1, 32, 32) for _ in range(4)]
        >>> data = TargetDataModule(train=images, batch_size=2)
    """

    wrapper: ClassVar[Any]  # the `WrappedDataModule` of the same package of Lightning

    def __init__(
        self,
        train: Dataset[Any] | Any = None,
        val: Dataset[Any] | Any = None,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        transform: Transform | Literal["affine"] | None = "affine",
        store_dir: str | Path | None = None,
        val_batch_size: int | None = None,
        pin_memory: bool = False,
        image_key: str = "image",
        label_key: str = "label",
        case_key: str = "case",
        test: Dataset[Any] | Any = None,
        predict: Dataset[Any] | Any = None,
        patch_size: Sequence[int] | None = None,
        patches_per_volume: int = 1,
        steps_per_epoch: int | None = None,
    ) -> None:
        require_lightning(self)
        super().__init__()
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(
                f"Expected `steps_per_epoch` to be at least 1, but got {steps_per_epoch}: `None` is one pass."
            )
        if patch_size is None and patches_per_volume != 1:
            raise ValueError(
                f"Expected `patch_size` with patches_per_volume={patches_per_volume}, but got none: pass both."
            )
        if isinstance(transform, str) and transform != "affine":
            raise ValueError(f"Expected `transform` to be 'affine', a function or None, but got {transform!r}.")
        self.train = train
        self.val = val
        self.test = test
        self.predict = predict
        self.transform: Transform | None = RandomAffine() if transform == "affine" else transform
        self.store_dir = store_dir
        self.keys = Keys(image_key, label_key, case_key)
        self.batch_size = batch_size
        alike = 1 if patch_size is not None else batch_size  # whole volumes may differ in size
        self.val_batch_size = alike if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.patches = None if patch_size is None else RandomPatches(patch_size, patches_per_volume)
        self.steps_per_epoch = steps_per_epoch
        self._loader_options: dict[str, dict[str, Any]] = {}  # of each loader: further arguments
        self._target: TargetDataset | None = None
        kinds = ("val", "test", "predict")
        self._own_hooks = {name for name in kinds if overrides(self, f"{name}_dataloader")}  # of a subclass
        self._offer_loaders()  # Lightning asks for them before `setup`

    @classmethod
    def from_datamodule(cls, existing: LightningDataModule, **options: Any) -> "TargetDataModule":
        """Wrap the data module of an existing project; `options` of `TargetDataModule` take precedence.

        Its training data set gives the target images, its other data sets validation, test and prediction, cut to the
        indices of a `SubsetRandomSampler`. Its batch size, workers, pinning and `drop_last` are used. Its `collate_fn`
        is called with one sample at a time. Its `on_before_batch_transfer` and `on_after_batch_transfer` run on all
        images, in training as they do in validation (`trainer.validating`), see image and label alone, and must not be
        random: pass random transforms as `transform`.
        Labels of training samples train nothing.

        Raises:
            TypeError: If a method of it returns anything but one `DataLoader`, or a list of one.
            ValueError: If a loader has a sampler or batch sampler of its own, or a hook cannot be kept.
        """
        wrapped: TargetDataModule = cls.wrapper(existing, options)
        return wrapped

    @property
    def trainer(self) -> Trainer | None:
        """The trainer, which sets itself before it asks for anything else."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        refuse_pairing(self, package_of(trainer))
        self._trainer = trainer

    @property
    def train_dataset(self) -> TargetDataset:
        """The target images with their pseudo labels, after `setup("fit")`."""
        if self._target is None:
            raise RuntimeError("Expected `setup('fit')` first: the trainer calls it, or you do.")
        return self._target

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage; within a process group, all ranks call it."""
        if stage == "fit":
            if self.train is None:
                raise ValueError("Expected target images for a fit, but got none: pass `train`.")
            if self.trainer is not None:
                refuse_left_over_group(self.trainer.world_size)
            directory, seed = self._run_directory(), run_seed()
            images = self._target_images()
            workers = self._options("train", 1)["num_workers"] > 0
            self._target = TargetDataset(images, directory, self.transform, self.keys, seed, self.patches, workers)
            # Not in `train_dataloader`: Lightning changes `DataLoader` while it calls that, also if it fails.
            if len(self.train_dataloader()) == 0:
                raise ValueError(
                    f"Expected at least one batch of {self.batch_size} of the {len(self._target)} target images, but "
                    "got none: your loader has drop_last=True, so pass a smaller `batch_size`."
                )
        self._offer_loaders()

    def train_dataloader(self) -> LazyDataLoader:
        dataset, trainer = self.train_dataset, self.trainer
        rank, world_size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        samples = None if self.steps_per_epoch is None else self.steps_per_epoch * self._joint_batch_size()
        sampler = EpochSampler(dataset, world_size, rank, dataset.seed, self._samples_done, samples)
        return LazyDataLoader(dataset, sampler=sampler, collate_fn=collate, **self._options("train", self.batch_size))

    def state_dict(self) -> dict[str, Any]:
        if self._target is None:
            return {}
        state = {"directory": str(self._target.store.directory), "seed": self._target.seed}
        return {**state, "joint_batch_size": self._joint_batch_size(), "steps_per_epoch": self.steps_per_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the seed and the store of the interrupted run; with another joint batch size a `ValueError`."""
        is_fit = self.trainer is None or self.trainer.state.fn == "fit"  # Lightning also calls it for a test
        if self._target is None or not state_dict or not is_fit:
            return
        if (saved := state_dict["joint_batch_size"]) != (now := self._joint_batch_size()):
            raise ValueError(
                f"Expected the batch size of the interrupted run, {saved} over all processes, but got {now}: change "
                "`batch_size` or the number of processes."
            )
        if (steps := state_dict["steps_per_epoch"]) != self.steps_per_epoch:
            raise ValueError(
                f"Expected the `steps_per_epoch` of the interrupted run, {steps}, but got {self.steps_per_epoch}: pass "
                "the same number."
            )
        self._target.seed = state_dict["seed"]
        store, earlier = self._target.store, Path(state_dict["directory"])
        # Another node may have the run in another root directory.
        for directory in (store.directory.with_name(earlier.name), earlier):
            if directory.is_dir():
                self._target.store = PseudoLabelStore(directory, store.length)
                break

    def _target_images(self) -> Any:
        """The target images; with `fast_dev_run` no more than are trained on."""
        batches = 0 if self.trainer is None else int(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
        count = batches * self._joint_batch_size()
        images: Any = self.train
        return Subset(images, range(count)) if hasattr(images, "__len__") and 0 < count < len(images) else images

    def _joint_batch_size(self) -> int:
        return self.batch_size * (1 if self.trainer is None else self.trainer.world_size)

    def _samples_done(self) -> int:
        """How many samples of the epoch this rank has done, when the first batch is fetched."""
        return 0 if self.trainer is None else batches_started(self.trainer) * self.batch_size

    def _offer_loaders(self) -> None:
        """Define the loader hooks of the data sets that exist: Lightning expects data from every hook."""
        for name in ("val", "test", "predict"):
            hook = f"{name}_dataloader"
            if name not in self._own_hooks and self._has(name):
                setattr(self, hook, partial(self._evaluation_loader, name))
            elif isinstance(vars(self).get(hook), partial):  # ours, of a data set that was taken away since
                delattr(self, hook)

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _evaluation_loader(self, name: str) -> DataLoader[Any]:
        if (dataset := getattr(self, name)) is None:
            raise RuntimeError("Expected `setup` first: the trainer calls it, or you do.")
        evaluated = EvaluationDataset(dataset, self.keys, labelled=name != "predict")
        return DataLoader(evaluated, collate_fn=collate_evaluated, **self._options(name, self.val_batch_size))

    def _options(self, name: str, batch_size: int) -> dict[str, Any]:
        shared = {"num_workers": self.num_workers, "pin_memory": self.pin_memory}
        options = {**shared, **self._loader_options.get(name, {}), "batch_size": batch_size}
        if not options["num_workers"]:  # a project's options of its workers, of which none are wanted
            options = {option: options[option] for option in options if option not in WORKER_OPTIONS}
        return {**options, "persistent_workers": options["num_workers"] > 0}

    def _run_directory(self) -> Path:
        """A new folder for this run, the same on all ranks."""
        name: str = broadcast(f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{secrets.token_hex(2)}")
        root = "." if self.trainer is None else self.trainer.default_root_dir
        if self.store_dir is None and "://" in str(root):
            raise ValueError(
                f"Expected a local folder for pseudo labels, but `default_root_dir` is {root}: pass `store_dir`."
            )
        return Path(self.store_dir or Path(root, "pseudo_labels")).expanduser().absolute() / name

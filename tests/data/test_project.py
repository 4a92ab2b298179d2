"""`from_datamodule` keeps what a project does to its data, or refuses it by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from monai.data import list_data_collate
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.labels.target_images import TargetImages

Make = Callable[..., pl.Trainer]


class Bytes(Images):
    """Images up to 255 in dictionaries, with masks (1, *S), as TorchGeo has them."""

    def __init__(self, count: int) -> None:
        super().__init__(count, labelled=True)

    def __getitem__(self, index: int) -> Any:
        image, mask = super().__getitem__(index)
        return {"image": 255 * image, "mask": mask[None]}


class Project(pl.LightningDataModule):
    """Normalises on the device; augments at random in training alone."""

    def __init__(self, **train: Any) -> None:
        super().__init__()
        self.options = {"train": train, "val": {}}
        self.stages: set[str] = set()

    def train_dataloader(self) -> Any:
        return DataLoader(Bytes(6), **{"batch_size": 2, **self.options["train"]})

    def val_dataloader(self) -> Any:
        return DataLoader(Bytes(3), **{"batch_size": 2, **self.options["val"]})

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "mask": batch["mask"].squeeze(1)}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert batch["mask"].dtype == torch.long
        self.stages.add(str(self.trainer.state.stage))
        noise = torch.rand_like(batch["image"]) if self.trainer.training else 0
        return {**batch, "image": batch["image"] / 255 + noise}


class Seen(TinyNet):
    """Keeps the largest value of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.inputs.append(image.detach().clone())
        return super().forward(image)


def fit(make: Make, project: pl.LightningDataModule, folder: Path, **options: Any) -> tuple[Any, Any]:
    options = {"label_key": "mask", "store_dir": folder / "labels", "transform": None, **options}
    data = TargetDataModule.from_datamodule(project, **options)
    module = APLModule(Seen(), CLASSES, ema_decay=None, batch_norm="adapt")
    module.model.network.inputs = []
    trainer = make(callbacks=[PseudoLabelCallback(guard="off")], default_root_dir=folder)
    trainer.fit(module, data)
    return trainer, module


def test_transfer_hooks_run_on_all_images(trainer: Make, tmp_path: Path) -> None:
    project = Project()
    ended, module = fit(trainer, project, tmp_path)
    inputs = [image for batch in module.model.network.inputs for image in batch]
    assert len(inputs) == 6 + 6 + 6 + 3 * 3, "BatchNorm, labels, training, three validations"
    assert 0.9 < max(float(image.max()) for image in inputs) <= 1
    known = {tuple(image.flatten().tolist()) for image in [*Images(6).images, *Images(3).images]}
    for image in inputs:
        assert min((image.flatten() - torch.tensor(other)).abs().max() for other in known) < 1e-5
    assert 0 <= ended.callback_metrics["val/dice"] <= 1
    assert "TRAINING" not in str(project.stages)


def test_hooks_of_pairs_and_plain_tensors(trainer: Make, tmp_path: Path) -> None:
    class Pairs(pl.LightningDataModule):
        def __init__(self, images: Any) -> None:
            super().__init__()
            self.images = images

        def train_dataloader(self) -> Any:
            return DataLoader(self.images, batch_size=3)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 7 if isinstance(batch, Tensor) else [batch[0] + 7, batch[1]]

    for images in (Images(6), Images(6, labelled=True)):
        _, module = fit(trainer, Pairs(images), tmp_path)
        assert min(float(batch.min()) for batch in module.model.network.inputs) >= 7


def test_random_hook_is_refused(trainer: Make, tmp_path: Path) -> None:
    class RandomlyFlipped(Project):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "image": batch["image"].flip(-1) if torch.rand(()) < 0.5 else batch["image"]}

    class Resized(Project):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "image": batch["image"][..., 2:]}

    with pytest.raises(ValueError, match="`on_after_batch_transfer` of your data module to be deterministic"):
        fit(trainer, RandomlyFlipped(), tmp_path)
    with pytest.raises(
        ValueError, match=r"keep the size of images, but it changed \(2, 1, 16, 16\) to \(2, 1, 16, 14\)"
    ):
        fit(trainer, Resized(), tmp_path)


class Failing(Project):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "crs": batch["crs"]}


class DividesByZero(Project):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "image": (batch["image"] - batch["image"]) / 0}


class MovesItself(Project):
    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return {**batch, "image": 100 * batch["image"]}


@pytest.mark.parametrize(
    ("project", "message"),
    [
        (Failing(), "to need image and label alone, but it raised KeyError: 'crs'. The batch has nothing else"),
        (DividesByZero(), "to return finite images, but got NaN or infinity: it may divide by 0"),
        (MovesItself(), "Expected MovesItself to leave `transfer_batch_to_device` to Lightning, but got its own"),
    ],
)
def test_hooks_that_cannot_run(trainer: Make, tmp_path: Path, project: Any, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(trainer, project, tmp_path)


def test_images_alone_for_training_and_pairs_for_validation(trainer: Make, tmp_path: Path) -> None:
    class Mixed(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Images(4), batch_size=2)

        def val_dataloader(self) -> Any:
            return DataLoader(Images(4, labelled=True), batch_size=2)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 7 if isinstance(batch, Tensor) else [batch[0] + 7, batch[1]]

    ended, module = fit(trainer, Mixed(), tmp_path)
    assert min(float(batch.min()) for batch in module.model.network.inputs) >= 7
    assert 0 <= ended.callback_metrics["val/dice"] <= 1


def test_subset_of_a_sampler(trainer: Make, tmp_path: Path) -> None:
    ended, _ = fit(trainer, Project(sampler=SubsetRandomSampler([5, 3, 1])), tmp_path)
    dataset = ended.train_dataloader.dataset
    assert [float(dataset.read(i)["image"].max()) for i in range(len(dataset))] == [
        float(Bytes(6)[i]["image"].max()) for i in (5, 3, 1)
    ]


def test_drop_last(trainer: Make, tmp_path: Path) -> None:
    assert fit(trainer, Project(batch_size=4, drop_last=True), tmp_path)[0].global_step == 1
    with pytest.raises(ValueError, match="at least one batch of 7 of the 6 target images, but got none"):
        fit(trainer, Project(batch_size=7, drop_last=True), tmp_path)


def doubled(samples: list[Any]) -> Any:
    batch = default_collate(samples)
    return {**batch, "image": batch["image"] * 2}


def test_collate_fn(trainer: Make, tmp_path: Path) -> None:
    project = Project(collate_fn=doubled)
    project.options["val"] = {"collate_fn": list_data_collate}
    data = TargetDataModule.from_datamodule(project, label_key="mask", store_dir=tmp_path)
    data.setup("fit")
    assert torch.equal(data.train_dataset.read(4)["image"], 2 * Bytes(6)[4]["image"])
    assert torch.equal(next(iter(data.val_dataloader()))["label"][1], Bytes(3)[1]["mask"][0])


def started(_: int) -> None:
    torch.manual_seed(123)


def test_worker_init_fn() -> None:
    data = TargetDataModule.from_datamodule(Project(num_workers=1, worker_init_fn=started), label_key="mask")
    data.setup("fit")
    assert data.train_dataloader().worker_init_fn is started
    assert data.val_dataloader().worker_init_fn is None


class Custom(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("train", {"sampler": WeightedRandomSampler([1.0] * 6, 6)}, "every image once, but got WeightedRandomSampler"),
        ("train", {"batch_sampler": Custom(SequentialSampler(range(6)), 2, False), "batch_size": 1}, "but got Custom"),
        ("train", {"batch_size": None}, "to make batches of a `batch_size`, but got NoneType"),
        ("val", {"drop_last": True}, "`val_dataloader` of Project to read every image, but got drop_last=True"),
        ("val", {"sampler": WeightedRandomSampler([1.0] * 3, 3)}, "Expected `val_dataloader` of Project to read every"),
        ("train", {"collate_fn": lambda samples: default_collate(samples * 3)}, "one image of sample 0, but got 3"),
    ],
)
def test_what_cannot_be_kept_is_refused(stage: str, options: Any, message: str) -> None:
    project = Project()
    project.options[stage] = options
    with pytest.raises(ValueError, match=message):
        TargetDataModule.from_datamodule(project, label_key="mask").setup("fit")


def test_another_data_set_replaces_that_of_a_refused_loader(tmp_path: Path) -> None:
    project = Project(sampler=WeightedRandomSampler([1.0] * 6, 6))
    data = TargetDataModule.from_datamodule(project, train=Bytes(5), batch_size=2, label_key="mask", store_dir=tmp_path)
    data.setup("fit")
    assert len(data.train_dataset) == 5


def test_state_of_the_project_is_kept() -> None:
    class Counting(Project):
        count = 3

        def state_dict(self) -> Any:
            return {"count": self.count}

        def load_state_dict(self, state_dict: Any) -> None:
            self.count = state_dict["count"]

    state = TargetDataModule.from_datamodule(Counting()).state_dict()
    fresh = Counting()
    fresh.count = 0
    TargetDataModule.from_datamodule(fresh).load_state_dict(state)
    assert fresh.count == 3


def test_a_list_of_one_loader(trainer: Make, tmp_path: Path) -> None:
    class Listed(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Images(4), 2)

        def val_dataloader(self) -> Any:
            return [DataLoader(Images(2, labelled=True), 2)]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    data = TargetDataModule.from_datamodule(Listed(), store_dir=tmp_path)
    run = trainer(callbacks=[PseudoLabelCallback(guard="off")])
    run.fit(APLModule(TinyNet(), CLASSES), data)
    assert "val/dice" in run.callback_metrics


@pytest.mark.filterwarnings("error:You defined a `validation_step`")
def test_lightning_sees_the_validation_data(trainer: Make, tmp_path: Path) -> None:
    class Existing(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Images(4), 2)

        def val_dataloader(self) -> Any:
            return DataLoader(Images(2, labelled=True), 2)

    of_sets = TargetDataModule(Images(4), Images(2, labelled=True), store_dir=tmp_path)
    for data in (of_sets, TargetDataModule.from_datamodule(Existing(), store_dir=tmp_path)):
        trainer(callbacks=[PseudoLabelCallback(guard="off")]).fit(APLModule(TinyNet(), CLASSES), data)


def test_validation_that_is_left_out_later(trainer: Make, tmp_path: Path) -> None:
    data = TargetDataModule(Images(4), Images(2, labelled=True), store_dir=tmp_path)
    data.val = None
    data.test_dataloader = list  # type: ignore[method-assign]  # the project's own hook stays
    run = trainer(callbacks=[PseudoLabelCallback(guard="off")])
    run.fit(APLModule(TinyNet(), CLASSES), data)
    assert "val/dice" not in run.callback_metrics
    assert data.test_dataloader is list
    with pytest.raises(RuntimeError, match="Expected `setup` first"):
        TargetDataModule.from_datamodule(Project()).val_dataloader()


def test_options_of_workers_are_kept(tmp_path: Path, trainer: Make) -> None:
    options = {"num_workers": 1, "multiprocessing_context": "spawn", "prefetch_factor": 7, "timeout": 33}
    data = TargetDataModule.from_datamodule(Project(**options), label_key="mask", store_dir=tmp_path)
    data.setup("fit")
    loader: Any = data.train_dataloader()
    run: Any = trainer()
    run.fit_loop._combined_loader = type("Loaders", (), {"iterables": loader})()
    for found in (loader, TargetImages(run, data.train_dataset, 2)._loader):
        assert found.multiprocessing_context.get_start_method() == "spawn"
        assert (found.prefetch_factor, found.timeout) == (7, 33)
    without = TargetDataModule.from_datamodule(Project(**options), num_workers=0, label_key="mask", store_dir=tmp_path)
    without.setup("fit")
    assert without.train_dataloader().num_workers == 0


def test_data_module_of_data_sets(tmp_path: Path) -> None:
    """Lightning sets its loaders on the object."""
    theirs = pl.LightningDataModule.from_datasets(Images(4), Images(3, labelled=True), batch_size=2)
    data = TargetDataModule.from_datamodule(theirs, store_dir=tmp_path)
    data.setup("fit")
    assert len(data.train_dataset) == 4
    assert len(data.val_dataloader().dataset) == 3  # type: ignore[arg-type]


def test_labels_need_a_local_folder(trainer: Make) -> None:
    data = TargetDataModule(Images(4))
    data.trainer = trainer(default_root_dir="memory://run")
    with pytest.raises(ValueError, match="Expected a local folder for pseudo labels, but .* memory://run: pass `store"):
        data.setup("fit")

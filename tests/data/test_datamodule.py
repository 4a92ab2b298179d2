"""TargetDataModule: existing data modules, one folder per run, 2D and 3D images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import RandGaussianNoised, RandSpatialCropd
from torch.utils.data import DataLoader, Dataset

from apl_lightning import APLModule, LazyDataLoader, PseudoLabelCallback, RandomAffine, TargetDataModule, TargetDataset
from apl_lightning.data import collate
from apl_lightning.data.joint_transforms import TARGET_KEYS


class Project(pl.LightningDataModule):
    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        self.images, self.held_out = Images(6, labelled=True), Images(3, labelled=True)

    def train_dataloader(self) -> Any:
        return DataLoader(self.images, batch_size=3, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=2)

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown")


def test_existing_data_module(tmp_path: Path, trainer: Any) -> None:
    project = Project()
    data = TargetDataModule.from_datamodule(project, store_dir=tmp_path, transform=None)
    fit = trainer(callbacks=[PseudoLabelCallback()])
    fit.fit(APLModule(TinyNet(), CLASSES), data)
    assert fit.global_step == 2
    assert (data.batch_size, data.val_batch_size, data.num_workers) == (3, 2, 0)
    assert {"prepare", "fit", "teardown"} <= set(project.calls)
    assert "val/dice" in fit.callback_metrics
    fit.validate(APLModule(TinyNet(), CLASSES), data, verbose=False)


def test_each_loader_keeps_its_workers(tmp_path: Path) -> None:
    data = TargetDataModule.from_datamodule(Project(workers=2), store_dir=tmp_path)
    data.setup("fit")
    assert (data.train_dataloader().num_workers, data.val_dataloader().num_workers) == (2, 0)
    data = TargetDataModule.from_datamodule(Project(workers=2), store_dir=tmp_path, num_workers=1)
    data.setup("fit")
    assert (data.train_dataloader().num_workers, data.val_dataloader().num_workers) == (1, 1)


def test_options_override_the_existing_data_module(tmp_path: Path) -> None:
    data = TargetDataModule.from_datamodule(Project(), store_dir=tmp_path, batch_size=1)
    data.setup("fit")
    assert data.train_dataloader().batch_size == 1
    assert data.val_dataloader().batch_size == 2


def test_several_loaders_are_an_error(tmp_path: Path) -> None:
    class Several(Project):
        def val_dataloader(self) -> Any:
            return [super().val_dataloader()] * 2

    with pytest.raises(TypeError, match="`val_dataloader` of Several to return one DataLoader, but got list"):
        TargetDataModule.from_datamodule(Several(), store_dir=tmp_path).setup("fit")


def test_existing_data_module_without_validation(tmp_path: Path, trainer: Any) -> None:
    class Blind(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Images(4), batch_size=2)

    data = TargetDataModule.from_datamodule(Blind(), store_dir=tmp_path)
    fit = trainer(callbacks=[PseudoLabelCallback()])
    fit.fit(APLModule(TinyNet(), CLASSES), data)
    assert fit.global_step == 2
    assert not [name for name in fit.callback_metrics if name.startswith("val/")]


def test_existing_data_module_with_no_loaders_for_validation(trainer: Any) -> None:
    """An empty list is as good as no method."""

    class Existing(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Images(4), batch_size=2)

        def val_dataloader(self) -> Any:
            return []

    run = trainer(callbacks=[PseudoLabelCallback()])
    run.fit(APLModule(TinyNet(), CLASSES), TargetDataModule.from_datamodule(Existing()))
    assert run.global_step == 2


def test_each_run_has_its_own_folder(tmp_path: Path, trainer: Any) -> None:
    data = TargetDataModule(Images(4), batch_size=2)
    folders = []
    for _ in range(2):
        fit = trainer(callbacks=[PseudoLabelCallback()])
        fit.fit(APLModule(TinyNet(), CLASSES), data)
        folders.append(data.train_dataset.store.directory)
    assert folders[0] != folders[1]
    assert all(folder.parent == tmp_path / "pseudo_labels" for folder in folders)
    assert all((folder / "round-000000" / "index.npz").exists() for folder in folders), (
        "the labels of the first run are kept"
    )


def test_fit_on_one_device_after_ddp_is_refused(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    data = TargetDataModule(Images(8), store_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"all 2 processes.*single device: refine in a script"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), data)


def test_custom_loader_never_overwrites_labels(tmp_path: Path, trainer: Any) -> None:
    loader = LazyDataLoader(TargetDataset(Images(4), tmp_path / "mine"), batch_size=2)
    trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), loader)
    with pytest.raises(ValueError, match="holds the labels of an earlier one: resume it with `ckpt_path`"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), loader)


def test_monai_transforms_differ_between_workers(tmp_path: Path) -> None:
    """Without separate seeds, forked workers draw the same noise for different samples."""
    noise = RandGaussianNoised(keys=["image"], prob=1, std=1.0)
    flat = [torch.full((1, 8, 8), float(index)) for index in range(2)]
    data = TargetDataModule(flat, batch_size=1, num_workers=2, transform=noise, store_dir=tmp_path)
    data.setup("fit")
    store = data.train_dataset.store
    store.start(0)
    with store.write(0, 2) as writer:
        for index in range(2):
            writer.add(index, torch.zeros(8, 8), torch.ones(8, 8))
    store.join(0)
    store.publish(0)
    first, second = (batch["image"] - batch["index"] for batch in data.train_dataloader())
    assert not np.allclose(first, second)


class Volumes(Dataset[Any]):
    def __init__(self, labelled: bool) -> None:
        self.samples = [
            {"image": torch.rand(1, *size), **({"label": torch.randint(5, (1, *size))} if labelled else {})}
            for size in ((20, 24, 18), (16, 16, 22), (24, 16, 16))
        ]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def test_volumes_in_patches_with_a_sliding_window(tmp_path: Path, trainer: Any) -> None:
    network = UNet(3, 1, 5, channels=(4, 8), strides=(2,), norm="batch")
    inferer = SlidingWindowInferer(roi_size=(16, 16, 16), sw_batch_size=2, overlap=0.25)
    data = TargetDataModule(
        Volumes(labelled=False),
        Volumes(labelled=True),
        batch_size=2,
        val_batch_size=1,
        transform=RandSpatialCropd(keys=TARGET_KEYS, roi_size=(16, 16, 16), random_size=False),
        store_dir=tmp_path,
    )
    module = APLModule(network, 5, inferer=inferer, example=torch.rand(1, 1, 16, 16, 16))
    fit = trainer(callbacks=[PseudoLabelCallback(inferer=inferer)])
    fit.fit(module, data)
    assert fit.global_step == 2
    assert data.train_dataset.store.read(0).labels.shape == (20, 24, 18)
    assert torch.isfinite(fit.callback_metrics["val/dice"])


def test_images_of_different_size_need_a_crop_or_batches_of_one(tmp_path: Path, trainer: Any) -> None:
    images = [torch.rand(1, 8, 8), torch.rand(1, 8, 12)]
    data = TargetDataModule(images, batch_size=2, store_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"one size in a batch, but got \[\(1, 8, 8\), \(1, 8, 12\)\]: pass `patch_size`, batch_size=1"
    ):
        trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), data)


def test_default_transform_is_random_affine() -> None:
    assert TargetDataModule(Images()).transform == RandomAffine()


def test_store_in_the_home_directory(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = TargetDataModule(Images(2), store_dir="~/labels")
    trainer(max_steps=1, callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), data)
    assert list((tmp_path / "labels").iterdir())


def test_a_sampler_of_ones_own(tmp_path: Path, trainer: Any) -> None:
    """Transforms draw anew in each epoch, and a resume within an epoch draws a warning."""
    noise = RandGaussianNoised(keys=["image"], prob=1, std=1.0)
    loader = LazyDataLoader(TargetDataset(Images(4), tmp_path, noise), batch_size=4, collate_fn=collate)
    trainer(callbacks=[PseudoLabelCallback(guard="off")]).fit(APLModule(TinyNet(), CLASSES), loader)
    first, second = (next(iter(loader))["image"] for _ in range(2))
    assert not torch.equal(first, second)
    with pytest.warns(UserWarning, match="come from SequentialSampler, which begins anew.*`TargetDataModule`"):
        loader.load_state_dict({})


def test_loader_of_a_subclass_is_kept() -> None:
    class Own(TargetDataModule):
        def val_dataloader(self) -> Any:
            return "mine"

    data = Own(Images(2), Images(2, labelled=True), test=Images(3, labelled=True))
    assert data.val_dataloader() == "mine"
    assert len(data.test_dataloader()) == 1

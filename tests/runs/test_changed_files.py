"""Damaged labels are made anew on resume; labels never meet other images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from damage import flip_a_bit, truncate, zero
from torch.utils.data import Dataset, Subset

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule

Make = Callable[..., pl.Trainer]


class Stop(pl.Callback):
    """Saves a checkpoint after the second step of the second epoch of three, and ends the run."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            raise KeyboardInterrupt


def fit(make: Make, folder: Path, images: Any, *callbacks: Any, resume: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    module = APLModule(TinyNet(), CLASSES)
    data = TargetDataModule(images, batch_size=2, store_dir=folder / "labels")
    trainer = make(max_epochs=3, callbacks=[PseudoLabelCallback(), *callbacks], default_root_dir=folder, **options)
    trainer.fit(module, data, ckpt_path=folder / "stopped.ckpt" if resume else None, weights_only=False)
    return trainer


@pytest.fixture
def stopped(trainer: Make, tmp_path: Path, images: Images) -> Path:
    with pytest.raises(SystemExit):
        fit(trainer, tmp_path, images, Stop())
    return tmp_path


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [zero, flip_a_bit, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", ["rank-00000.bin", "index.npz"])
def test_a_damaged_round_is_made_anew(stopped: Path, trainer: Make, images: Images, harm: Any, name: str) -> None:
    (path,) = (stopped / "labels").glob(f"*/round-000001/{name}")
    harm(path)
    with pytest.warns(UserWarning, match=f"round 1 are made anew with the weights.*{name} as it was written"):
        ended = fit(trainer, stopped, images, resume=True)
    assert ended.callbacks[0].round == 3
    assert ended.train_dataloader.dataset.store.damage(3) == ""


def test_a_damaged_round_before_a_due_one(trainer: Make, tmp_path: Path, images: Images) -> None:
    """A checkpoint at the end of an epoch: the next round is due, and the one before is no longer needed."""

    class AtTheEnd(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(trainer, tmp_path, images, AtTheEnd())
    flip_a_bit(next((tmp_path / "labels").glob("*/round-000001/rank-00000.bin")))
    with pytest.warns(UserWarning, match="round 1 are made anew"):
        ended = fit(trainer, tmp_path, images, resume=True)
    assert ended.callbacks[0].round == 2
    assert ended.train_dataloader.dataset.store.damage(2) == ""


def test_an_intact_round_is_kept(stopped: Path, trainer: Make, images: Images) -> None:
    assert fit(trainer, stopped, images, resume=True).callbacks[0].round == 2


def test_the_labels_of_another_run_are_made_anew(stopped: Path, trainer: Make, images: Images) -> None:
    """Two runs continue from one checkpoint; the first one's next checkpoint finds the second one's labels."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (2, 1):
                trainer.save_checkpoint(stopped / "first.ckpt")

    class Change(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.1)

    fit(trainer, stopped, images, Save(), resume=True)
    fit(trainer, stopped, images, Change(), resume=True)
    (stopped / "first.ckpt").rename(stopped / "stopped.ckpt")
    with pytest.warns(UserWarning, match="round 2 are made anew with the weights.*round-000002 are of another run"):
        ended = fit(trainer, stopped, images, resume=True)
    assert ended.callbacks[0].round == 3


def test_a_round_damaged_during_training_is_named(trainer: Make, tmp_path: Path, images: Images) -> None:
    class Damage(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            store = trainer.train_dataloader.dataset.store
            zero(store.folder(store.current) / "rank-00000.bin")

    with pytest.raises(RuntimeError, match="rank-00000.bin as it was written.*the checksum of sample"):
        fit(trainer, tmp_path, images, Damage())


@pytest.mark.parametrize(
    "changed", [lambda images: Subset(images, [0, 2, 1, 3, 4, 5]), lambda images: Images(6, (16, 17))]
)
def test_a_changed_data_set_is_refused_on_resume(
    stopped: Path, trainer: Make, images: Images, changed: Callable[[Images], Any]
) -> None:
    with pytest.raises(ValueError, match="to be the image that its pseudo label was made on, but it is another one"):
        fit(trainer, stopped, changed(images), resume=True)


def test_a_changed_data_set_is_refused_before_a_new_round(trainer: Make, tmp_path: Path, images: Images) -> None:
    class AtTheEnd(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    fit(trainer, tmp_path, images, AtTheEnd())
    shutil.rmtree(next((tmp_path / "labels").glob("*/round-000001")), ignore_errors=True)
    module, data = APLModule(TinyNet(), CLASSES), TargetDataModule(Subset(images, [0, 2, 1, 3, 4, 5]), batch_size=2)
    again = trainer(max_epochs=4, callbacks=[PseudoLabelCallback()], default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="Expected sample 1 to be the image that its pseudo label was made on"):
        again.fit(module, data, ckpt_path=tmp_path / "stopped.ckpt", weights_only=False)


class SometimesFlipped(Dataset[Any]):
    """Flips an image once it has been read five times: by the checks, for BatchNorm, and for labels."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.reads = [0] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return self.images[index].flip(-1) if index == 4 and self.reads[index] > 5 else self.images[index]


def test_a_random_transform_in_the_data_set_is_found_in_training(trainer: Make, tmp_path: Path, images: Images) -> None:
    with pytest.raises(
        ValueError, match="Expected sample 4 to be the image.*pass its random transforms as `transform`"
    ):
        fit(trainer, tmp_path, SometimesFlipped(images))


class OtherOrder(Images):
    """Rank 1 lists its files in another order, as nodes with disks of their own may do."""

    def __getitem__(self, index: int) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return super().__getitem__(len(self) - 1 - index if rank == 1 else index)


def test_nodes_with_another_order_of_files_are_refused(trainer: Make, tmp_path: Path) -> None:
    expected = r"Comparing the target images .* failed on ranks \[1\]: ValueError: Expected sample"
    with pytest.raises(Exception, match=expected):
        fit(trainer, tmp_path, OtherOrder(), devices=2, strategy="ddp_fork")

"""An error on one rank stops all ranks within seconds, with a message that names its origin."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet, fork_further
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch.utils.data import get_worker_info

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.denoisers import APL

Make = Callable[..., pl.Trainer]
PATIENCE = 60  # timeout in seconds; a run takes about 2


class Troubled(Images):
    """Once armed, one sample raises an error or kills the worker that reads it."""

    def __init__(self, trouble: str, bad: int) -> None:
        super().__init__(40, (64, 64))
        self.trouble = trouble
        self.bad = bad

    def __getitem__(self, index: int) -> Any:
        if index == self.bad and armed.is_set():
            if self.trouble == "sample":
                raise OSError("unexpected end of file")
            if self.trouble == "worker" and get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


armed = multiprocessing.get_context("fork").Event()


class Arm(pl.Callback):
    """Arms the error in all processes at a moment of the run; may limit the file size on one rank."""

    def __init__(self, moment: str, full_disk_on: int | None = None) -> None:
        self.moment = moment
        self.full_disk_on = full_disk_on

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.moment in ("first labels", "first look"):
            self._arm(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.moment == "later labels":
            self._arm(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.moment == "training":
            self._arm(trainer)

    def _arm(self, trainer: Any) -> None:
        armed.set()
        if trainer.global_rank == self.full_disk_on:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


class FailsOnRankOne(APL):
    """A denoiser that fails on rank 1 only."""

    def __call__(self, p_main: Any, p_aux: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            raise ZeroDivisionError("division by zero")
        return super().__call__(p_main, p_aux)


def attempt(queue: Any, make: Make, folder: Path, data: Any, arm: Arm, denoiser: Any, workers: int) -> None:
    fork_further()
    module = APLModule(TinyNet(), CLASSES, batch_norm="auto" if arm.moment == "first look" else "adapt")
    data = TargetDataModule(data, batch_size=4, num_workers=workers, store_dir=folder)
    callbacks = [arm, PseudoLabelCallback(denoiser)]
    try:
        make(max_epochs=3, devices=2, strategy="ddp_fork", callbacks=callbacks).fit(module, data)
    except BaseException as error:
        queue.put(str(error))
    else:
        queue.put("no error")


def message(*arguments: Any) -> str:
    """The error message of a run in its own process, so that limits and signals do not affect the tests."""
    armed.clear()
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    process = fork.Process(target=attempt, args=(queue, *arguments))
    process.start()
    text: str = queue.get(timeout=PATIENCE)
    process.join(PATIENCE)
    assert not process.is_alive()
    return text


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_sample_in_the_label_pass(tmp_path: Path, trainer: Make, workers: int) -> None:
    text = message(trainer, tmp_path, Troubled("sample", 20), Arm("later labels"), None, workers)
    assert "Making pseudo labels failed on ranks [1]: " in text
    assert "sample 20: OSError: unexpected end of file" in text


def test_corrupt_sample_in_the_first_look(tmp_path: Path, trainer: Make) -> None:
    """Before its BatchNorm statistics are chosen, the network predicts all images."""
    text = message(trainer, tmp_path, Troubled("sample", 20), Arm("first look"), None, 0)
    assert "Predicting the target images failed on ranks [1]: " in text
    assert "sample 20: OSError: unexpected end of file" in text


def test_corrupt_sample_in_training(tmp_path: Path, trainer: Make) -> None:
    text = message(trainer, tmp_path, Troubled("sample", 20), Arm("training"), None, 0)
    assert "sample 20: OSError: unexpected end of file" in text


def test_killed_worker(tmp_path: Path, trainer: Make) -> None:
    text = message(trainer, tmp_path, Troubled("worker", 20), Arm("later labels"), None, 1)
    assert "Making pseudo labels failed on ranks [1]: RuntimeError: DataLoader worker" in text


def test_full_disk(tmp_path: Path, trainer: Make) -> None:
    text = message(trainer, tmp_path, Troubled("", 0), Arm("later labels", full_disk_on=1), None, 0)
    assert "Making pseudo labels failed on ranks [1]: " in text
    assert "while writing pseudo labels (2 bytes per pixel)" in text
    assert "free some space or pass another `store_dir`" in text


def test_denoiser_error_on_one_rank(tmp_path: Path, trainer: Make) -> None:
    text = message(trainer, tmp_path, Troubled("", 0), Arm("never"), FailsOnRankOne(), 0)
    assert "Making pseudo labels failed on ranks [1]: ZeroDivisionError: division by zero" in text


def test_sharded_networks_are_refused(network: TinyNet) -> None:
    module: Any = APLModule(network, CLASSES)
    loop = SimpleNamespace(_data_source=SimpleNamespace(instance=None))
    for strategy in (SingleDeviceStrategy(), DDPStrategy()):
        strategy.broadcast = lambda value: value
        trainer = SimpleNamespace(strategy=strategy, callbacks=[], fit_loop=loop, world_size=1)
        PseudoLabelCallback().setup(trainer, module, "fit")
    with pytest.raises(ValueError, match="whole network on each device, but got FSDPStrategy, .*strategy='ddp'"):
        PseudoLabelCallback().setup(SimpleNamespace(strategy=FSDPStrategy(), callbacks=[]), module, "fit")

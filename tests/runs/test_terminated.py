"""SIGTERM ends a run in one way: a message, exit code 143, and a checkpoint from which it goes on exactly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet, fork_further
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.multiprocessing import ProcessExitedException

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.denoisers import APL

Make = Callable[..., pl.Trainer]
PATIENCE = 60  # timeout in seconds; a run takes about 2
# Two batches of labels, of training and of validation: the third call is in the second round.
PLACES: dict[str, tuple[type, str]] = {
    "label pass": (APL, "__call__"),
    "training": (APLModule, "training_step"),
    "validation": (APLModule, "validation_step"),
}


class End(pl.Callback):
    """Saves the weights at the end of training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(pl_module.state_dict(), self.path)


def terminate_in_third_call(owner: type, name: str, ranks: list[int]) -> None:
    """Send SIGTERM to the process itself; only in a forked process."""
    function: Any = getattr(owner, name)
    calls: list[None] = []

    def wrapped(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 3 and int(os.environ.get("LOCAL_RANK", 0)) in ranks:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    setattr(owner, name, wrapped)


def fit(make: Make, folder: Path, devices: int, saving: bool = True) -> None:
    torch.manual_seed(0)
    module = APLModule(TinyNet(), CLASSES, learning_rate=1e-2, batch_norm="adapt")
    options = {"batch_size": 4 // devices, "val_batch_size": 2 // devices, "store_dir": folder / "labels"}
    callbacks = [PseudoLabelCallback(batch_size=4 // devices, guard="off"), End(folder / "end.pt")]
    if saving:
        callbacks.append(ModelCheckpoint(folder, save_last=True, every_n_train_steps=1))
    strategy = {} if devices == 1 else {"devices": devices, "strategy": "ddp_fork"}
    run = make(callbacks=callbacks, enable_checkpointing=saving, max_epochs=3, num_sanity_val_steps=0, **strategy)
    run.fit(module, TargetDataModule(Images(8), Images(4, labelled=True), **options), ckpt_path="last")


class Ended(NamedTuple):
    """How a process ended: its exit code, its warnings, and the error that it raised."""

    code: int | None
    warnings: list[str]
    error: str


def in_a_process(task: Callable[[], None]) -> Ended:
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()

    def run() -> None:
        fork_further()
        error = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                task()
            except ProcessExitedException as stop:
                error = str(stop)
            finally:
                queue.put(([str(warning.message) for warning in caught], error))

    process = fork.Process(target=run)
    process.start()
    process.join(PATIENCE)
    process.kill()
    assert process.exitcode is not None, "the run hangs"
    return Ended(process.exitcode, *queue.get())


@pytest.mark.parametrize("place", PLACES)
def test_terminated(tmp_path: Path, trainer: Make, place: str) -> None:
    def stop() -> None:
        terminate_in_third_call(*PLACES[place], ranks=[0])
        fit(trainer, tmp_path / "stopped", 1)

    assert in_a_process(partial(fit, trainer, tmp_path / "whole", 1)).code == 0
    ended = in_a_process(stop)
    assert ended.code == 143
    (message,) = [text for text in ended.warnings if text.startswith("SIGTERM")]
    assert "exit code 143; resume it with `trainer.fit(module, data, ckpt_path='last')`" in message
    assert not (tmp_path / "stopped" / "end.pt").exists()
    assert in_a_process(partial(fit, trainer, tmp_path / "stopped", 1)).code == 0
    expected, found = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "stopped"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("ranks", [[0, 1], [1]], ids=["both ranks", "one rank"])
def test_label_pass_of_two_processes_terminated(tmp_path: Path, trainer: Make, ranks: list[int]) -> None:
    """The parent of `ddp_fork` reports the exit code of its processes; `test_launched.py` tests `ddp`."""

    def stop() -> None:
        terminate_in_third_call(*PLACES["label pass"], ranks=ranks)
        fit(trainer, tmp_path, 2)

    assert "terminated with exit code 143" in in_a_process(stop).error


def test_terminated_without_a_checkpoint(tmp_path: Path, trainer: Make) -> None:
    def stop() -> None:
        terminate_in_third_call(*PLACES["training"], ranks=[0])
        fit(trainer, tmp_path, 1, saving=False)

    ended = in_a_process(stop)
    assert ended.code == 143
    assert any("no checkpoint `last` to resume from: pass `ModelCheckpoint(save_last=True" in w for w in ended.warnings)

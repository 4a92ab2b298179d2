"""A run that `max_steps` has stopped resumes as if it had not been stopped."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from pytorch_lightning.callbacks import ModelCheckpoint

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule


class Log(pl.Callback):
    """Records the batches; at the batch number `killed` the run fails."""

    def __init__(self, killed: int = -1) -> None:
        self.seen: list[Any] = []
        self.killed = killed

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.seen) == self.killed:
            raise KeyError("killed")
        self.seen.append((trainer.current_epoch, batch_idx, batch["index"].tolist(), batch["round"]))


def halved(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("batches", [1.0, 3])
@pytest.mark.parametrize("stop", [4, 5, 6, 7, 8])
def test_resumed_after_max_steps(trainer: Callable[..., pl.Trainer], tmp_path: Path, stop: int, batches: Any) -> None:
    """With the checkpoint that Lightning saves at the end of the stopped epoch; four steps an epoch, or three."""

    def fit(folder: Path, resume: str = "", **options: Any) -> tuple[list[Any], Any]:
        torch.manual_seed(0)
        module, log = APLModule(TinyNet(), CLASSES, lr_scheduler=halved), Log()
        data = TargetDataModule(Images(8), batch_size=2, store_dir=folder)
        saving = ModelCheckpoint(folder / "saved", save_last=True)
        callbacks = [PseudoLabelCallback(), log, saving]
        run = trainer(
            max_epochs=3, callbacks=callbacks, enable_checkpointing=True, limit_train_batches=batches, **options
        )
        run.fit(module, data, ckpt_path=folder / resume if resume else None, weights_only=False)
        if not resume:
            run.save_checkpoint(folder / "after.ckpt")
        return log.seen, module.state_dict()

    expected, weights = fit(tmp_path / "whole")
    first, _ = fit(tmp_path / "stopped", max_steps=stop)
    for name in ("saved/last.ckpt", "after.ckpt"):  # the second one is saved after `fit`
        again = shutil.copytree(tmp_path / "stopped", tmp_path / Path(name).stem)
        second, resumed = fit(again, resume=name)
        assert first + second == expected
        for key, value in weights.items():
            assert torch.equal(resumed[key], value), key


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3, "max_steps": 100}, {"max_epochs": -1, "max_steps": 11}, {"max_epochs": 3}]
)
def test_resumed_from_the_end_of_an_epoch(
    trainer: Callable[..., pl.Trainer], tmp_path: Path, limits: dict[str, int]
) -> None:
    """With the checkpoint that Lightning saves by default; the run fails in the next epoch."""

    def fit(folder: Path, killed: int = -1, resume: str | None = None) -> tuple[list[Any], Any]:
        torch.manual_seed(0)
        module, log = APLModule(TinyNet(), CLASSES, lr_scheduler=halved), Log(killed)
        data = TargetDataModule(Images(8), batch_size=2, store_dir=folder)
        callbacks = [PseudoLabelCallback(), log, ModelCheckpoint(folder / "saved", save_last=True)]
        run = trainer(callbacks=callbacks, enable_checkpointing=True, **limits)
        with contextlib.suppress(KeyError):
            run.fit(module, data, ckpt_path=resume, weights_only=False)
        return log.seen, module.state_dict()

    expected, weights = fit(tmp_path / "whole")
    first, _ = fit(tmp_path / "killed", killed=6)
    second, resumed = fit(tmp_path / "killed", resume=str(tmp_path / "killed" / "saved" / "last.ckpt"))
    assert first[:4] + second == expected
    for key, value in weights.items():
        assert torch.equal(resumed[key], value), key

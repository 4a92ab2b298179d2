"""A run that is resumed after its last step restores the same round as the uninterrupted run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from test_guard import Fade, Save, fit

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule

Make = Callable[..., pl.Trainer]


def test_run_resumed_after_its_last_step_restores(tmp_path: Path, trainer: Make) -> None:
    """Such a run has no steps left and never calls `on_train_end`; the same holds if a finished script runs again."""
    saved = tmp_path / "saved.ckpt"
    with pytest.warns(UserWarning, match="the network as it came in is restored"):
        first, states = fit(tmp_path, trainer, PseudoLabelCallback(), 2, callbacks=[Fade(2), Save(saved, after=1)])
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, states[0][name]), name
    again = APLModule(TinyNet(), CLASSES, learning_rate=0.05)
    data = TargetDataModule(Images(6), store_dir=tmp_path / "labels")
    with pytest.warns(UserWarning, match="the network as it came in is restored"):
        trainer(max_epochs=2, callbacks=[PseudoLabelCallback()]).fit(again, data, ckpt_path=saved, weights_only=False)
    for name, value in again.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name

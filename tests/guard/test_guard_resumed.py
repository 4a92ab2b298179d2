"""A run that is resumed after its last step restores the same round as the uninterrupted run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from test_guard import Fade, Save, fit, named_gains

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.guard import Snapshot
from apl_lightning.labels import Labelling

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


def test_resumed_run_remembers_what_was_best(tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that only warns has no file of its best network, but knows its gain."""
    saved = tmp_path / "saved.ckpt"
    monkeypatch.setattr(Labelling, "gains", lambda *_: named_gains(0.2))
    fit(tmp_path, trainer, PseudoLabelCallback(guard="warn"), 2, callbacks=[Save(saved, after=1)])
    monkeypatch.setattr(Labelling, "gains", lambda *_: named_gains(0.05))
    with pytest.warns(UserWarning, match="In round 2, the Dice is .5.0 points .* best candidate .20.0 points"):
        fit(tmp_path, trainer, PseudoLabelCallback(guard="warn"), 3, ckpt_path=saved)


def test_run_without_a_guard_resumes_with_one(tmp_path: Path, trainer: Make) -> None:
    """It has never settled, so it makes new labels."""
    saved, resumed = tmp_path / "saved.ckpt", PseudoLabelCallback()
    fit(tmp_path, trainer, PseudoLabelCallback(guard="off"), 5, callbacks=[Save(saved, after=4)])
    fit(tmp_path, trainer, resumed, 10, ckpt_path=saved)
    assert resumed.round == 9


def test_resumed_run_keeps_the_network_of_its_checkpoint(tmp_path: Path) -> None:
    """It may be killed once more before it saves another one."""
    saved, resumed, again = Snapshot(), Snapshot(), Snapshot()
    saved.round = 0
    saved.write(torch.nn.Linear(2, 2), tmp_path)
    resumed.load_state_dict(saved.state_dict())
    resumed.round = 1
    resumed.write(torch.nn.Linear(2, 2), tmp_path)
    again.load_state_dict(saved.state_dict())
    assert again.is_in(tmp_path)

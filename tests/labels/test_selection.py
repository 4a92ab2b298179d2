"""Which network the guard judges, and when."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from conftest import CLASSES, Images, TinyNet

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.guard import Guard
from apl_lightning.labels import Labelling, Selection
from apl_lightning.labels.labelling import CAREFUL_GAIN, GAIN


def test_guard_judges_the_main_head(tmp_path: Path, trainer: Any) -> None:
    class FadeAux(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            for part in (module.model, module.teacher.module):
                part.second.bias.data[0] += 100

    callback = PseudoLabelCallback()
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.0, batch_norm="frozen")
    trainer(max_epochs=2, callbacks=[callback, FadeAux()]).fit(module, TargetDataModule(Images(6), store_dir=tmp_path))
    assert callback.statistics["pseudo/estimated_gain"] == 0
    assert callback.statistics["pseudo/agreement"] < 1
    assert module.model.second.bias[0] > 90, "nothing is restored"


def test_a_run_that_warned_resumes_with_restore() -> None:
    warned, restoring = Selection(Guard("warn")), Selection(Guard("restore"))
    assert warned.guard.is_best(0.2, 0.2)
    restoring.load_state_dict(warned.state_dict())
    assert not restoring.guard.is_harmed(0.0), "there is no file of the network with a gain of 0.2"
    assert restoring.guard.is_best(0.1, 0.1)


def test_both_gains_of_the_best_candidate_are_remembered() -> None:
    first, resumed = Selection(Guard("warn")), Selection(Guard("warn"))
    assert first.guard.is_best(0.2, careful=0.1)
    resumed.load_state_dict(first.state_dict())
    assert resumed.guard.is_harmed(0.14)
    assert not resumed.guard.is_best(0.3, careful=0.104)


def test_round_0_draws_no_warning(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = [-0.1, 0.0]
    monkeypatch.setattr(Labelling, "gains", lambda *_: dict.fromkeys((GAIN, CAREFUL_GAIN), gains.pop(0)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[PseudoLabelCallback(guard="warn")]).fit(
            APLModule(TinyNet(), CLASSES, batch_norm="frozen"), TargetDataModule(Images(4), store_dir=tmp_path)
        )
    assert not [str(w.message) for w in caught if "by estimate" in str(w.message)]


class Spoil(pl.Callback):
    """Makes the network of the last epoch useless."""

    def __init__(self, bias: float = 1000) -> None:
        self.bias = bias

    def on_train_end(self, trainer: Any, module: Any) -> None:
        for part in (module.model, module.teacher.module):
            part.network.classifier.bias.data[0] += self.bias


def test_no_gain_of_a_network_that_is_gone_stays(tmp_path: Path, trainer: Any) -> None:
    """Of NaN no gain of a class is known."""
    run = trainer(max_epochs=2, callbacks=[Spoil(float("nan")), PseudoLabelCallback()])
    with pytest.warns(UserWarning, match="not finite.*is restored"):
        run.fit(APLModule(TinyNet(), CLASSES), TargetDataModule(Images(6), store_dir=tmp_path))
    shown = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith(GAIN)}
    assert shown == {GAIN: 0.0}


@pytest.mark.parametrize("guard", ["warn", "restore"])
def test_the_log_ends_with_the_gain_of_the_last_network(tmp_path: Path, trainer: Any, guard: Any) -> None:
    """Here it is useless: with "restore" the run ends with another one."""
    callback, logger = PseudoLabelCallback(guard=guard), pl.loggers.CSVLogger(tmp_path)
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.0)
    data = TargetDataModule(Images(6), store_dir=tmp_path / "labels")
    run = trainer(max_epochs=2, callbacks=[Spoil(), callback], logger=logger, log_every_n_steps=1)
    with pytest.warns(UserWarning, match=r"After the last epoch, the Dice is -"):
        run.fit(module, data)
    assert callback.selection.has_restored == (guard == "restore")
    true = callback.measure(run, module)
    assert (true[GAIN] < -0.01) == (guard == "warn")
    assert {name: float(run.callback_metrics[name]) for name in true} == pytest.approx(true)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    assert [float(row[GAIN]) for row in rows if row[GAIN]] == pytest.approx([0, 0, true[GAIN]])

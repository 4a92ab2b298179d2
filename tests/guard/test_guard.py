"""The guard ends with the best candidate, the network as it came in included, and only if the last one is harmed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from damage import zero
from torch import Tensor, nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.denoisers import UPL
from apl_lightning.guard import Guard, Snapshot, careful_gain
from apl_lightning.labels import Labelling
from apl_lightning.labels.labelling import CAREFUL_GAIN, GAIN
from apl_lightning.refinement import adapt_batch_norm

Make = Callable[..., pl.Trainer]
Gains = list[float]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "on"}, "the guard to be one of .*'restore'.* but got 'on'"),
        ({"mode": "warn", "kept": 1.5}, r"`kept` in \[0, 1\], but got 1.5"),
    ],
)
def test_bad_options_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**options)


def test_guard() -> None:
    guard = Guard("restore", kept=0.5)
    assert not guard.is_best(-0.1, -0.1)
    assert not guard.is_harmed(0.0), "no candidate is better than the network as it came in"
    assert guard.is_harmed(-0.01)
    assert guard.is_harmed(float("nan"))
    assert guard.is_best(0.2, careful=0.1)
    assert not guard.is_best(0.3, careful=0.104), "less than half a point higher"
    assert not guard.is_harmed(0.1)
    assert guard.is_harmed(0.09)
    assert guard.is_best(0.19, careful=0.106)
    assert guard.is_harmed(0.094)


def test_less_than_a_point_is_no_harm() -> None:
    guard = Guard("restore")
    assert guard.is_best(0.015, careful=0.015)
    assert not guard.is_harmed(0.0051)
    assert guard.is_harmed(0.0049)
    guard.reset()
    assert guard.is_best(0.006, careful=0.006)
    assert not guard.is_harmed(0.0)
    assert guard.is_harmed(-0.001), "below the network as it came in"


def test_careful_gain() -> None:
    gains = torch.randn(100, 5).tolist()
    for row in gains:
        expected = (sum(g for g in row if g > 0) + 4 * sum(g for g in row if g < 0)) / 5
        assert careful_gain(row) == pytest.approx(expected)
        assert careful_gain(row, loss_weight=1) == pytest.approx(sum(row) / 5)
    assert careful_gain([]) == 0


def named_gains(gain: float, careful: float | None = None) -> dict[str, float]:
    """What `Labelling.gains` returns."""
    return {GAIN: gain, CAREFUL_GAIN: gain if careful is None else careful}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Take the estimated gains from a list: of the rounds and of the network after the last epoch."""

    def script(*gains: float) -> None:
        left = list(gains)
        monkeypatch.setattr(Labelling, "gains", lambda *_: named_gains(left.pop(0)))

    return script


class Weights(pl.Callback):
    """Records the weights as they came in, and those that made each round."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.states.append({name: value.clone() for name, value in module.model.state_dict().items()})

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.on_train_epoch_start(trainer, module)


def fit(folder: Path, trainer: Make, callback: PseudoLabelCallback, epochs: int = 3, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    arguments = {"learning_rate": 0.05, "batch_norm": "frozen", **options.pop("module", {})}
    module, weights = APLModule(TinyNet(), CLASSES, **arguments), Weights()
    data = TargetDataModule(Images(6), store_dir=folder / "labels")
    ckpt_path = options.pop("ckpt_path", None)
    run = trainer(max_epochs=epochs, callbacks=[callback, weights, *options.pop("callbacks", [])], **options)
    run.fit(module, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else False)
    return module, weights.states


def assert_same(module: Any, state: dict[str, Tensor]) -> None:
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("gains", "best"),
    [
        ((0.1, 0.2, 0.1, 0.0), "of round 1"),
        ((0.1, 0.0, -0.1, -0.2), "of round 0"),
        ((-0.1, -0.1, -0.1, -0.01), "as it came in"),
        ((0.1, 0.2, 0.4, 0.29), "of round 2"),
    ],
)
def test_restore(tmp_path: Path, trainer: Make, scripted: Any, gains: tuple[float, ...], best: str) -> None:
    scripted(*gains)
    with pytest.warns(UserWarning, match=f"After the last epoch, .* guard='restore': the network {best} is restored"):
        module, states = fit(tmp_path, trainer, PseudoLabelCallback())
    came_in, *rounds = states
    assert_same(module, came_in if best == "as it came in" else rounds[int(best[-1])])
    (folder,) = (tmp_path / "labels").iterdir()
    assert len(list(folder.glob("best*"))) == 1


@pytest.mark.parametrize("gains", [(0.1, 0.2, 0.3, 0.25), (-0.1, -0.2, -0.1, 0.0)])
def test_last_network_is_kept(tmp_path: Path, trainer: Make, scripted: Any, gains: tuple[float, ...]) -> None:
    scripted(*gains)
    module, states = fit(tmp_path, trainer, PseudoLabelCallback())
    weight = module.model.network.encoder[0].weight
    assert all(not torch.equal(weight, state["network.encoder.0.weight"]) for state in states)


def test_a_gain_that_hides_a_loss(tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = [named_gains(0.1, careful=-0.01)] * 3 + [named_gains(-0.01)]
    monkeypatch.setattr(Labelling, "gains", lambda *_: gains.pop(0))
    with pytest.warns(UserWarning, match="the network as it came in is restored"):
        module, states = fit(tmp_path, trainer, PseudoLabelCallback())
    assert_same(module, states[0])


def test_warn_changes_nothing(tmp_path: Path, trainer: Make, scripted: Any) -> None:
    scripted(0.1, 0.01, 0.2, 0.0)
    with pytest.warns(UserWarning, match="by estimate") as caught:
        module, states = fit(tmp_path, trainer, PseudoLabelCallback(guard="warn"))
    texts = [str(warning.message) for warning in caught if "by estimate" in str(warning.message)]
    assert [text.split(",")[0] for text in texts] == ["In round 1", "After the last epoch"]
    assert (
        "+1.0 points from that of the network as it came in by estimate, and that of the best candidate +10.0"
        in texts[0]
    )
    assert not torch.equal(module.model.network.encoder[0].weight, states[-1]["network.encoder.0.weight"])


def test_off_looks_at_nothing(tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Labelling, "look", None)
    callback = PseudoLabelCallback(guard="off")
    fit(tmp_path, trainer, callback)
    assert "pseudo/estimated_gain" not in callback.statistics


AUTO = {"batch_norm": "auto"}


@pytest.mark.parametrize(
    ("gain", "share", "chosen"),
    [
        (0.02, 1.0, "those re-estimated"),
        (0.009, 0.5, "the mean of those of the source and"),
        (-0.009, 0.5, "the mean of those of the source and"),
        (-0.02, 0.0, "those of the source"),
    ],
)
def test_batch_norm_is_chosen_by_the_estimate(
    tmp_path: Path, trainer: Make, scripted: Any, capfd: Any, caplog: Any, gain: float, share: float, chosen: str
) -> None:
    scripted(gain, 0.1, 0.1)
    callback = PseudoLabelCallback()
    with caplog.at_level("INFO"):
        module, states = fit(tmp_path, trainer, callback, 1, module=AUTO)
    assert f"the statistics are {chosen}" in caplog.text + capfd.readouterr().err
    assert callback.statistics["pseudo/batch_norm_gain"] == gain
    source = TinyNet()
    source.load_state_dict({name[8:]: value for name, value in states[0].items() if name.startswith("network.")})
    adapted = copy.deepcopy(source)
    adapt_batch_norm(adapted, [torch.stack(list(Images(6)))])
    for name in ("running_mean", "running_var"):
        values = [getattr(network.encoder[1], name) for network in (source, adapted)]
        expected = (1 - share) * values[0] + share * values[1]
        for part in (module.model, module.teacher.module):
            torch.testing.assert_close(getattr(part.network.encoder[1], name), expected)


def test_restored_network_has_the_statistics_that_came_in(tmp_path: Path, trainer: Make, scripted: Any) -> None:
    """The first candidate is the network before BatchNorm statistics were re-estimated."""
    scripted(0.1, -0.1, -0.1)
    with pytest.warns(UserWarning, match="the network as it came in is restored"):
        module, states = fit(tmp_path, trainer, PseudoLabelCallback(), 1, module=AUTO)
    assert_same(module, states[0])
    assert not module.model.network.encoder[1].running_mean.any()


class Save(pl.Callback):
    """Saves a checkpoint after an epoch."""

    def __init__(self, path: Path, after: int) -> None:
        self.path = path
        self.after = after

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.after:
            trainer.save_checkpoint(self.path)


class Fade(pl.Callback):
    """Shifts the classifiers towards class 0 at the start of given rounds."""

    def __init__(self, *epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch + 1 in self.epochs:
            for part in (module.model, module.teacher.module):
                for classifier in (part.network.classifier, part.second):
                    classifier.bias.data[0] += 100


@pytest.mark.parametrize("denoiser", [None, lambda p, q: (p.argmax(1) * 0, torch.ones_like(p[:, 0])), UPL(views=1)])
def test_restore_after_a_collapse_but_not_without_one(tmp_path: Path, trainer: Make, denoiser: Any) -> None:
    """The real guard judges what the main head predicts, for each denoiser."""
    callback = PseudoLabelCallback(denoiser)
    with pytest.warns(UserWarning, match="the network as it came in is restored"):
        module, states = fit(
            tmp_path / "fading", trainer, callback, 2, callbacks=[Fade(2)], module={"learning_rate": 0.0}
        )
    assert_same(module, states[0])
    unchanged = PseudoLabelCallback(denoiser)
    fit(tmp_path / "unchanged", trainer, unchanged, epochs=2, module={"learning_rate": 0.0})
    assert unchanged.statistics["pseudo/estimated_gain"] == 0, "an unchanged network has no gain"


def test_measured_gain_is_that_in_evaluation_mode(tmp_path: Path, trainer: Make) -> None:
    class WithDropout(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.append(nn.Dropout(0.5))

    class Measure(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            measured.append(labels.measure(trainer, module)["pseudo/estimated_gain"])
            assert module.model.network.encoder[4].training

    measured: list[float] = []
    labels = PseudoLabelCallback()
    module = APLModule(WithDropout(), CLASSES, learning_rate=0.0, ema_decay=None, dropout=True)
    trainer(callbacks=[labels, Measure()]).fit(module, TargetDataModule(Images(4), batch_size=2, store_dir=tmp_path))
    assert measured == [0, 0]


@pytest.mark.parametrize("harm", [Path.unlink, zero])
def test_lost_snapshot_keeps_the_last_network(
    tmp_path: Path, trainer: Make, scripted: Any, harm: Callable[[Path], None]
) -> None:
    class Lose(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            for path in (tmp_path / "labels").rglob("best-*"):
                harm(path)

    scripted(0.1, 0.2, 0.1, 0.0)
    with pytest.warns(UserWarning, match="the network of round 1 was better, but its file in .* is missing or damaged"):
        module, states = fit(tmp_path, trainer, PseudoLabelCallback(), callbacks=[Lose()])
    weight = module.model.network.encoder[0].weight
    assert all(not torch.equal(weight, state["network.encoder.0.weight"]) for state in states)


def test_resumed_run_restores_the_same_round(tmp_path: Path, trainer: Make, scripted: Any) -> None:
    """The first run has another best round after the checkpoint; the resumed run ignores its file."""
    saved = tmp_path / "saved.ckpt"
    scripted(0.1, 0.0, 0.2, 0.2)
    _, states = fit(tmp_path, trainer, PseudoLabelCallback(), callbacks=[Save(saved, after=0)])
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.05, batch_norm="frozen")
    data = TargetDataModule(Images(6), store_dir=tmp_path / "labels")
    scripted(0.0, 0.0, 0.0)
    with pytest.warns(UserWarning, match="network of round 0 is restored"):
        trainer(max_epochs=3, callbacks=[PseudoLabelCallback()]).fit(module, data, ckpt_path=saved, weights_only=False)
    assert_same(module, states[1])


def test_a_snapshot_of_another_run_is_not_restored(tmp_path: Path) -> None:
    """Two runs that continue from one checkpoint write a file for the same round in the same folder."""
    first, second = Snapshot(), Snapshot()
    first.write(nn.Linear(2, 2), tmp_path)
    resumed = Snapshot()
    resumed.load_state_dict(first.state_dict())
    assert resumed.is_in(tmp_path)
    second.write(nn.Linear(2, 2), tmp_path)
    assert second.is_in(tmp_path)
    assert not resumed.is_in(tmp_path)


def test_resumed_run_without_its_snapshot_keeps_a_later_network(tmp_path: Path, trainer: Make, scripted: Any) -> None:
    saved = tmp_path / "saved.ckpt"
    scripted(0.3, 0.1, 0.2, 0.3)
    fit(tmp_path, trainer, PseudoLabelCallback(), callbacks=[Save(saved, after=0)])
    for path in (tmp_path / "labels").rglob("best-*"):
        path.unlink()
    scripted(0.1, 0.2, 0.0)
    with pytest.warns(UserWarning, match="best") as caught:
        fit(tmp_path, trainer, PseudoLabelCallback(), ckpt_path=saved)
    (found, restored) = [str(warning.message) for warning in caught if "best" in str(warning.message)]
    assert "missing, damaged or that of another run" in found
    assert "the network of round 2 is restored" in restored


@pytest.mark.parametrize(
    ("gains", "patience", "rounds"),
    [
        ((0.1, 0.2, 0.2005, 0.15, 0.2, 0.2), 3, 5),  # a rise by 0.0005 does not count
        ((0.1, 0.2, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3), 3, 7),
        ((-0.1, -0.2, -0.1), 1, 2),
        ((0.0,) * 9, None, 8),
    ],
)
def test_labels_stay_once_the_gain_no_longer_rises(
    tmp_path: Path, trainer: Make, scripted: Any, gains: tuple[float, ...], patience: int | None, rounds: int
) -> None:
    scripted(*gains)
    callback = PseudoLabelCallback(patience=patience)
    fit(tmp_path, trainer, callback, epochs=8)
    assert callback.round == rounds - 1
    assert [callback.should_update(epoch) for epoch in (8, 9)] == [patience is None] * 2


@pytest.mark.parametrize(
    ("gains", "careful", "rounds"),
    [([0.1, 0.2, 0.3, 0.4, 0.5], [-0.1] * 5, 5), ([0.1] * 5, [0.01, 0.02, 0.03, 0.04, 0.05], 3)],
    ids=["rising", "flat"],
)
def test_labels_settle_by_the_estimated_gain(
    tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch, gains: Gains, careful: Gains, rounds: int
) -> None:
    left = [named_gains(*both) for both in zip([*gains, 0.5], [*careful, 0.5], strict=True)]
    monkeypatch.setattr(Labelling, "gains", lambda *_: left.pop(0))
    callback = PseudoLabelCallback(patience=2)
    fit(tmp_path, trainer, callback, epochs=5)
    assert callback.round == rounds - 1


def test_resumed_run_is_as_patient(tmp_path: Path, trainer: Make, scripted: Any) -> None:
    saved = tmp_path / "saved.ckpt"
    scripted(0.1, 0.1, 0.1, 0.1, 0.1)
    fit(tmp_path, trainer, PseudoLabelCallback(), epochs=3, callbacks=[Save(saved, after=2)])
    scripted(0.1, 0.1)
    resumed = PseudoLabelCallback()
    fit(tmp_path, trainer, resumed, epochs=6, ckpt_path=saved)
    assert resumed.round == 3


def test_second_fit_has_its_own_candidates(tmp_path: Path, trainer: Make, scripted: Callable[..., None]) -> None:
    callback = PseudoLabelCallback()
    for gain in (0.5, 0.1):
        scripted(gain, gain)
        fit(tmp_path / str(gain), trainer, callback, epochs=1)
        assert callback.guard.best == gain


def test_the_log_ends_with_the_restored_network(tmp_path: Path, trainer: Make, scripted: Any) -> None:
    scripted(-0.1, -0.2, -0.1)
    torch.manual_seed(0)
    held_out = Images(4, labelled=True)
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.5, batch_norm="frozen")
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved")
    data = TargetDataModule(Images(6), held_out, test=held_out, store_dir=tmp_path / "labels")
    run = trainer(max_epochs=2, callbacks=[PseudoLabelCallback(), saving], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="is restored"):
        run.fit(module, data)
    logged = float(run.callback_metrics["val/dice"])
    tester = trainer()
    assert tester.test(module, data)[0]["test/dice"] == pytest.approx(logged)
    # Lightning takes a checkpoint, as it does without a module.
    with pytest.warns(UserWarning, match=r"restored a network after this checkpoint was saved.*trainer.test\(module"):
        run.test(datamodule=data, ckpt_path="best")

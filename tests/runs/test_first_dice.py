"""`val/dice` of the network as it came in, at step 0, and of a finished run that is started again."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from pytorch_lightning.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    ThroughputMonitor,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule

Make = Callable[..., pl.Trainer]


class DropoutNet(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.append(nn.Dropout2d(0.3))


def fit(make: Make, folder: Path, *callbacks: Any, network: Any = None, val: Any = True, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"aux": options.pop("aux", "auto"), "learning_rate": 1e-2, "batch_norm": "adapt", "dropout": True}
    module = APLModule(network or DropoutNet(), CLASSES, **settings)
    labelled = Images(5, labelled=True) if val else None
    size = 4 // options.get("devices", 1)
    data = TargetDataModule(Images(8), labelled, batch_size=size, val_batch_size=2, store_dir=folder / "labels")
    ckpt_path = options.pop("ckpt_path", None)
    run = make(
        callbacks=[*callbacks, PseudoLabelCallback(guard="off")],
        logger=CSVLogger(folder, name="", version=options.pop("version", "log")),
        **{"max_epochs": 2, "log_every_n_steps": 1, **options},
    )
    run.fit(module, data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return run


def logged(folder: Path, version: str = "log") -> dict[int, float]:
    """`val/dice` by step."""
    with (folder / version / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["val/dice"]) for row in csv.DictReader(file) if row.get("val/dice")}


def dice(network: nn.Module) -> float:
    """The mean Dice over cases and foreground classes of a plain network."""
    images, labels = (torch.stack(list(column)) for column in zip(*Images(5, labelled=True), strict=True))
    with torch.no_grad():
        found = network.eval()(images).argmax(1)
    values = []
    for c in range(1, CLASSES):
        ours, theirs = found == c, labels == c
        values.append(2 * (ours & theirs).flatten(1).sum(1) / (ours.flatten(1).sum(1) + theirs.flatten(1).sum(1)))
    return float(torch.stack(values).mean())


def test_network_as_it_came_in(tmp_path: Path, trainer: Make) -> None:
    network = DropoutNet()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.rand(8)  # adapted BatchNorm gives another Dice
    expected = dice(network)
    run = fit(trainer, tmp_path, network=network, aux="fresh")  # a new second head, which is warmed up
    found = logged(tmp_path)
    assert list(found) == [0, 1, 3]
    assert found[0] == pytest.approx(expected)
    assert float(run.callback_metrics["val/dice"]) == pytest.approx(found[3])


@pytest.mark.parametrize("options", [{"val": False}, {"limit_val_batches": 0}])
def test_run_without_validation_logs_none(tmp_path: Path, trainer: Make, options: Any) -> None:
    fit(trainer, tmp_path, **options)
    assert logged(tmp_path) == {}


def test_limited_validation(tmp_path: Path, trainer: Make) -> None:
    """`limit_val_batches` holds, and `num_sanity_val_steps` does not matter."""
    counts = []

    class Count(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
            counts.append((trainer.sanity_checking, trainer.global_step))

    for sanity in (0, 1):
        fit(trainer, tmp_path / str(sanity), Count(), limit_val_batches=2, num_sanity_val_steps=sanity, max_epochs=1)
        assert counts == [(True, 0)] * sanity + [(False, 0)] * 2 + [(False, 2)] * 2
        counts.clear()
    assert logged(tmp_path / "0") == logged(tmp_path / "1")


def test_training_is_the_same_without_validation(tmp_path: Path, trainer: Make) -> None:
    """Also for what is drawn from the global generators in the label pass and in preparation."""
    runs = [fit(trainer, tmp_path / str(val), val=val, aux="fresh") for val in (True, False)]
    first, second = (run.lightning_module.state_dict() for run in runs)
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`:UserWarning")  # the module has no FLOPs
def test_throughput_is_that_of_epochs(tmp_path: Path, trainer: Make) -> None:
    """The monitor starts its clock after this callback has validated."""
    monitor = ThroughputMonitor(lambda batch: len(batch["image"]), window_size=2)
    run = trainer(
        callbacks=[PseudoLabelCallback(), monitor], logger=CSVLogger(tmp_path), max_epochs=2, log_every_n_steps=1
    )
    data = TargetDataModule(Images(8), Images(5, labelled=True), batch_size=4, store_dir=tmp_path / "labels")
    run.fit(APLModule(TinyNet(), CLASSES), data)
    assert set(logged(tmp_path / "lightning_logs", "version_0")) == {0, 1, 3}


def test_checkpoints_and_early_stopping_count_epochs(tmp_path: Path, trainer: Make) -> None:
    seen: list[tuple[str, int]] = []

    class Stopping(EarlyStopping):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(("stopping", trainer.global_step))
            super().on_validation_end(trainer, pl_module)

    class Other(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(("other", trainer.global_step))

    saving = ModelCheckpoint(tmp_path, monitor="val/dice", mode="max", every_n_train_steps=1, save_top_k=-1)
    # A network that came in perfect would stop the run after its first epoch.
    stopping = Stopping("val/dice", mode="max", patience=1, check_on_train_epoch_end=False)
    run = fit(trainer, tmp_path, stopping, saving, Other(), enable_checkpointing=True)
    assert [step for name, step in seen if name == "stopping"] == [2, 4]
    assert [step for name, step in seen if name == "other"] == [0, 2, 4]
    assert run.callbacks[0] is stopping
    found = logged(tmp_path)
    scores = [float(score) for score in saving.best_k_models.values()]
    assert scores
    assert found[0] not in scores


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_start"])
def test_checkpoint_before_the_first_round_is_resumed(tmp_path: Path, trainer: Make, hook: str) -> None:
    class Save(pl.Callback):
        pass

    def save(trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 0 and not trainer.sanity_checking:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    saving = Save()
    setattr(saving, hook, save)  # before the labels of `PseudoLabelCallback`, which comes later
    whole = fit(trainer, tmp_path, saving)
    resumed = fit(trainer, tmp_path / "resumed", ckpt_path=tmp_path / "saved.ckpt")
    assert list(logged(tmp_path / "resumed")) == [0, 1, 3]
    assert logged(tmp_path / "resumed") == logged(tmp_path)
    expected, found = (run.lightning_module.state_dict() for run in (whole, resumed))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_processes_log_the_dice_of_one(tmp_path: Path, trainer: Make) -> None:
    for devices, options in ((1, {}), (2, {"devices": 2, "strategy": "ddp_fork"})):
        fit(trainer, tmp_path / str(devices), max_epochs=1, **options)
    one, two = (logged(tmp_path / name)[0] for name in "12")
    assert one == pytest.approx(two)


@pytest.mark.filterwarnings("ignore")  # Rich and Lightning warn about the terminal
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("sanity", [0, 2])
def test_progress_bars(tmp_path: Path, trainer: Make, bar: Any, sanity: int) -> None:
    """`fit` puts the bar before `PseudoLabelCallback`; Lightning's default bar comes after it."""
    options: Any = {"enable_progress_bar": True, "num_sanity_val_steps": sanity, "max_epochs": 1}
    fit(trainer, tmp_path / "before", bar(), **options)

    def after(callbacks: Any, **others: Any) -> pl.Trainer:
        return trainer(callbacks=callbacks[::-1], **others)

    fit(after, tmp_path / "after", bar(), **options)
    assert logged(tmp_path / "before") == logged(tmp_path / "after")


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("when", ["every_n_train_steps", "every_n_epochs"])
def test_finished_run_started_again(tmp_path: Path, trainer: Make, devices: int, when: str) -> None:
    """It takes no step and logs the Dice of its last epoch."""
    options: Any = {"enable_checkpointing": True, **({"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {})}
    frequency: Any = {when: 2 if when == "every_n_train_steps" else 1}

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1, **frequency)

    first = fit(trainer, tmp_path, saving(), **options)
    found = logged(tmp_path)
    last = tmp_path / "checkpoints" / "step=4.ckpt"
    again = fit(trainer, tmp_path, saving(), version="again", ckpt_path=last, **options)
    assert again.callback_metrics["val/dice"] == first.callback_metrics["val/dice"]
    assert list(logged(tmp_path, "again").values()) == [found[3]]
    resumed = tmp_path / "checkpoints" / "step=2.ckpt"
    fit(trainer, tmp_path, saving(), version="resumed", ckpt_path=resumed, **options)
    assert logged(tmp_path, "resumed") == {3: found[3]}

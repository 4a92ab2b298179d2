"""Tests of private parts of Lightning that the package uses: each fails if Lightning changes the part."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import apl_lightning
import apl_lightning.lightning_pytorch
from apl_lightning import APLModule, PseudoLabelCallback
from apl_lightning._support import lightning as door
from apl_lightning._support.class_only import class_only
from apl_lightning._support.lightning_package import overrides

Make = Callable[..., pl.Trainer]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.layer(batch).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ask(pl.Callback):
    """Evaluates a function of trainer and module before each batch."""

    def __init__(self, question: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        self.question = question
        self.answers: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.answers.append(self.question(trainer, module))


def answers(make: Make, question: Callable[[Any, Any], Any], **options: Any) -> list[Any]:
    ask = Ask(question)
    make(callbacks=[ask, *options.pop("callbacks", [])], **options).fit(Module(), DataLoader(Images(4), 2))
    return ask.answers


def test_attached_callbacks(trainer: Make) -> None:
    assert door.attached_callbacks(Module()) == ()
    (first, _) = answers(trainer, lambda _, module: [type(c) for c in door.attached_callbacks(module)])
    assert Ask in first


def test_autocast(trainer: Make) -> None:
    def dtype(trainer: Any, module: Any) -> torch.dtype:
        with door.autocast(trainer):
            return module.layer(torch.rand(1, 1, 2, 2)).dtype

    assert answers(trainer, dtype, precision="bf16-mixed") == [torch.bfloat16] * 2
    assert answers(trainer, dtype) == [torch.float32] * 2


def test_batches_started_includes_those_before_a_resume(trainer: Make, tmp_path: Any) -> None:
    assert answers(trainer, lambda trainer, _: door.batches_started(trainer), max_epochs=2) == [1, 2, 1, 2]
    started: list[int] = []

    class Loader(DataLoader[Any]):
        def __iter__(self) -> Any:
            def lazily() -> Any:
                started.append(door.batches_started(run))
                yield from super(Loader, self).__iter__()

            return lazily()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    run = trainer(callbacks=[Save()])
    run.fit(Module(), Loader(Images(4), 2))
    run = trainer()
    run.fit(Module(), Loader(Images(4), 2), ckpt_path=tmp_path / "1.ckpt", weights_only=False)
    assert started == [0, 1]


def test_to_device(trainer: Make) -> None:
    moved = answers(trainer, lambda trainer, _: door.to_device(trainer, {"image": torch.ones(1)})["image"].device)
    assert moved == [torch.device("cpu")] * 2


def test_to_device_runs_hooks_in_the_precision_of_the_trainer(trainer: Make) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Images(4), 2)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"image": batch["image"] + 1} if isinstance(batch, dict) else batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"image": batch["image"] * 10} if isinstance(batch, dict) else batch

    ask = Ask(lambda trainer, _: door.to_device(trainer, {"image": torch.ones(1)})["image"])
    trainer(callbacks=[ask], precision="64-true").fit(Module(), Data())
    assert ask.answers == [torch.tensor([20.0])] * 2
    assert ask.answers[0].dtype == torch.float64


def test_as_validation(trainer: Make) -> None:
    def stages(trainer: Any, _: Any) -> Any:
        with door.as_validation(trainer):
            inside = trainer.training, trainer.validating
        return inside, trainer.training

    assert answers(trainer, stages) == [((False, True), True)] * 2


def test_overrides() -> None:
    class Data(pl.LightningDataModule):
        def val_dataloader(self) -> Any:
            return []

    assert overrides(Data(), "val_dataloader")
    assert not overrides(Data(), "train_dataloader")


def test_class_only() -> None:
    class Base:
        @class_only
        def name(cls) -> str:
            return cls.__name__

    class Other(Base):
        @class_only
        def name(cls) -> str:
            return f"{super().name()}!"

    assert Other.name() == "Other!"
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Other().name()


def test_copy_without_trainer(trainer: Make) -> None:
    module = Module()
    trainer().fit(module, DataLoader(Images(2)))
    copied: Any = door.copy_without_trainer(module)
    assert module._trainer is not None
    assert copied._trainer is None
    assert torch.equal(copied.layer.weight, module.layer.weight)
    assert isinstance(door.copy_without_trainer(nn.Linear(1, 1)), nn.Linear)


def test_has_finished(trainer: Make) -> None:
    assert answers(trainer, lambda trainer, _: door.has_finished(trainer)) == [False, False]
    run = trainer()
    run.fit(Module(), DataLoader(Images(2)))
    assert door.has_finished(run)


def test_log_hyperparameters(trainer: Make, tmp_path: Any) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)

    class Start(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            door.log_hyperparameters(trainer, pl_module, {"ours": 1, "shared": 2})

    module = Module()
    module.save_hyperparameters({"shared": 3})
    trainer(callbacks=[Start()], logger=logger).fit(module, DataLoader(Images(2)))
    assert logger.experiment.hparams == {"ours": 1, "shared": 3}
    hidden = Module()
    hidden.save_hyperparameters({"shared": 3}, logger=False)
    trainer(callbacks=[Start()], logger=logger).fit(hidden, DataLoader(Images(2)))
    assert logger.experiment.hparams == {"ours": 1, "shared": 2}
    logger.experiment.hparams.clear()
    trainer(callbacks=[Start()], logger=logger, enable_autolog_hparams=False).fit(module, DataLoader(Images(2)))
    assert logger.experiment.hparams == {}


@pytest.mark.filterwarnings("ignore")  # Rich and Lightning warn about the terminal
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bar(trainer: Make, bar: Any) -> None:
    assert answers(trainer, lambda trainer, _: door.progress_bar(trainer)) == [None, None]
    shown = bar()
    found = answers(trainer, lambda trainer, _: door.progress_bar(trainer), callbacks=[shown], enable_progress_bar=True)
    assert found == [shown, shown]
    shown.disable()
    hidden = trainer(callbacks=[shown], enable_progress_bar=True)
    assert door.progress_bar(hidden) is None


@pytest.mark.filterwarnings("ignore")
def test_rich_progress_adds_a_task(trainer: Make) -> None:
    bar = RichProgressBar()
    assert bar.progress is None

    def tasks(_trainer: Any, _module: Any) -> list[str]:
        progress = bar.progress
        task = progress.add_task("label pass", total=2)
        progress.advance(task)
        names = [entry.description for entry in progress.tasks]
        progress.remove_task(task)
        return names

    assert all("label pass" in names for names in answers(trainer, tasks, callbacks=[bar], enable_progress_bar=True))


def test_record_sigterm_stops_the_loop_and_forwards_the_signal(trainer: Make) -> None:
    killed: list[int] = []

    class Launcher:
        def kill(self, number: int) -> None:
            killed.append(number)

    def record(trainer: Any, _module: Any) -> bool:
        trainer.strategy._launcher = Launcher()
        door.record_sigterm(trainer, signal.SIGTERM)
        door.record_sigterm(trainer, signal.SIGTERM)
        trainer.strategy._launcher = None
        return bool(trainer.received_sigterm)

    ask = Ask(record)
    with pytest.raises(SIGTERMException):
        trainer(callbacks=[ask]).fit(Module(), DataLoader(Images(4), 2))
    assert ask.answers == [True], "the loop stops before the next batch"
    assert killed == [signal.SIGTERM], "the signal is forwarded once"


@pytest.mark.parametrize(
    ("Trainer", "ours", "cure"),
    [
        (pl.Trainer, apl_lightning.lightning_pytorch, "from apl_lightning import PseudoLabelCallback"),
        (lightning.pytorch.Trainer, apl_lightning, "from apl_lightning.lightning_pytorch import PseudoLabelCallback"),
    ],
)
def test_refuse_other_package(Trainer: Any, ours: Any, cure: str) -> None:  # noqa: N803
    with pytest.raises(TypeError, match=f"a trainer of.*but got one of.*`{cure}`"):
        Trainer(callbacks=[ours.PseudoLabelCallback()], logger=False)
    module, bare = ours.APLModule(TinyNet(), CLASSES), Trainer(logger=False, enable_checkpointing=False)
    for run in (bare.fit, bare.validate, bare.test, bare.predict):
        with pytest.raises(TypeError, match=f"a trainer of.*`{cure.replace('PseudoLabelCallback', 'APLModule')}`"):
            run(module, [torch.rand(2, 1, 8, 8)])


@pytest.mark.parametrize("named", [True, False])
def test_refuse_other_data(trainer: Make, tmp_path: Any, named: bool) -> None:
    data = apl_lightning.lightning_pytorch.TargetDataModule([torch.rand(1, 8, 8)], store_dir=tmp_path)
    given = {"datamodule": data} if named else {"train_dataloaders": data}
    with pytest.raises(TypeError, match="`from apl_lightning import TargetDataModule`"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), **given)


def test_require_lightning() -> None:
    both = "`from apl_lightning import .* or `from apl_lightning.lightning_pytorch import"
    for make in (
        apl_lightning.callback.PseudoLabelCallback,
        apl_lightning.visualize.PseudoLabelOverlay,
        apl_lightning.data.TargetDataModule,
        lambda: apl_lightning.refinement.APLModule(TinyNet(), CLASSES),
    ):
        with pytest.raises(TypeError, match=f"Expected a class of Lightning, but got apl_lightning.*{both}"):
            make()


def test_refuse_sharded(trainer: Make) -> None:
    door.refuse_sharded(trainer())

    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(ValueError, match="whole network on each device, but got FSDPStrategy"):
        door.refuse_sharded(trainer(strategy=FSDPStrategy(), accelerator="auto", devices="auto"))


def test_on_root_device(trainer: Make) -> None:
    """At `on_fit_end` the module is on the CPU, and its trainer still knows the device of this rank."""
    devices: list[Any] = []

    class End(pl.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            with door.on_root_device(trainer, pl_module):
                devices.append(pl_module.layer.weight.device)

    trainer(callbacks=[End()]).fit(Module(), DataLoader(Images(2)))
    assert devices == [torch.device("cpu")]


@pytest.mark.parametrize(
    "averaging", [pl.callbacks.StochasticWeightAveraging(0.1), pl.callbacks.EMAWeightAveraging(decay=0.9)]
)
def test_refuse_weight_averaging(trainer: Make, averaging: Any) -> None:
    door.refuse_weight_averaging(trainer())
    with pytest.raises(ValueError, match=f"no `{type(averaging).__name__}`.*use `ema_decay`"):
        door.refuse_weight_averaging(trainer(callbacks=[averaging]))


@pytest.mark.parametrize("finder", [pl.callbacks.LearningRateFinder, pl.callbacks.BatchSizeFinder])
def test_refuse_tuner(trainer: Make, finder: Any) -> None:
    door.refuse_tuner(trainer())
    with pytest.raises(ValueError, match=f"no `{finder.__name__}`"):
        door.refuse_tuner(trainer(callbacks=[finder()]))


def test_validate(trainer: Make) -> None:
    """It runs and logs a whole validation, and leaves the trainer, its loop and random numbers as before."""
    steps: list[str] = []

    class Validated(Module):
        def validation_step(self, batch: Tensor) -> None:
            steps.append(self.trainer.state.stage)
            self.log("val/value", torch.rand(()))

    class End(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            steps.append(type(self).__name__)

    class Saving(pl.callbacks.ModelCheckpoint, End):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            End.on_validation_end(self, trainer, pl_module)

    class Stopping(pl.callbacks.EarlyStopping, End):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            End.on_validation_end(self, trainer, pl_module)

    class Start(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            callbacks, random = trainer.callbacks, torch.get_rng_state()
            door.validate(trainer)
            assert steps == ["validate", "validate", "End"]
            assert "val/value" in trainer.callback_metrics
            assert trainer.callbacks == callbacks
            assert trainer.state.stage == "train"
            assert trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.ready == 0
            assert torch.equal(torch.get_rng_state(), random)
            steps.clear()

    loader = DataLoader(Images(4), 2)
    options: Any = {"num_sanity_val_steps": 0, "enable_checkpointing": True}
    callbacks = [Start(), End(), Saving(save_top_k=0), Stopping("val/value")]
    trainer(callbacks=callbacks, **options).fit(Validated(), loader, loader)
    assert steps == ["validate", "validate", "End", "Stopping", "Saving"]
    steps.clear()
    (nothing,) = {len(steps) for _ in answers(trainer, lambda trainer, _: door.validate(trainer), max_steps=1)}
    assert nothing == 0, "a fit without validation"

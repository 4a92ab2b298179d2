"""Denoiser, callback and optimiser are in the log beside the hyperparameters of the module."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import CLASSES, Images, TinyNet
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, SelfTrainingModule, TargetDataModule, TentModule, denoisers
from apl_lightning._support.hyperparameters import named
from apl_lightning.denoisers import CBST, Denoiser

EXPECTED = {
    "denoiser/name": "CBST",
    "denoiser/portion": 0.3,
    "denoiser/step": 0.05,
    "denoiser/largest": 0.5,
    "callback/name": "PseudoLabelCallback",
    "callback/every_n_epochs": 2,
    "callback/batch_size": None,
    "callback/guard": "off",
    "callback/ignore_small_components": False,
    "callback/largest_component_share": 0.75,
    "callback/inferer": "whole",
    "optimizer/name": "SGD",
    "optimizer/lr": 0.02,
    "optimizer/momentum": 0.9,
    "lr_scheduler/name": "StepLR",
    # of the module
    "num_classes": CLASSES,
    "learning_rate": 0.02,
    "consistency_weight": 0.5,
}


DENOISERS: list[Any] = [
    kind for kind in vars(denoisers).values() if isinstance(kind, type) and issubclass(kind, Denoiser)
]


def whole(image: Any, network: Any) -> Any:
    return network(image)


def fit(make: Any, folder: Path, module: Any, callback: PseudoLabelCallback, **options: Any) -> None:
    make(callbacks=[callback], **options).fit(module, TargetDataModule(Images(2), store_dir=folder / "labels"))


def yaml_of(logger: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    return found


def tensorboard_of(logger: Any) -> dict[str, Any]:
    """What the HPARAMS page shows."""
    events = EventAccumulator(logger.log_dir).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # from wandb
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from tensorboard
def test_every_logger_shows_them(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    sgd = partial(torch.optim.SGD, momentum=0.9)
    module = APLModule(
        TinyNet(), CLASSES, consistency_weight=0.5, learning_rate=0.02, optimizer=sgd, lr_scheduler=scheduler
    )
    callback = PseudoLabelCallback(
        CBST(portion=0.3), every_n_epochs=2, inferer=whole, guard="off", largest_component_share=0.75
    )
    csv, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    wandb = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(trainer, tmp_path, module, callback, logger=[csv, board, wandb])
    config = dict(wandb.experiment.config)
    wandb.experiment.finish()
    for found in (yaml_of(csv), yaml_of(board), config):
        assert EXPECTED.items() <= found.items()
    shown = tensorboard_of(board)
    assert {name: value for name, value in EXPECTED.items() if value is not None}.items() <= shown.items()
    assert dict(module.hparams).keys() & {"denoiser/name", "callback/guard"} == set(), "the checkpoint does not change"


def test_the_module_comes_first(tmp_path: Path, trainer: Any) -> None:
    class Named(APLModule):
        def __init__(self) -> None:
            super().__init__(TinyNet(), CLASSES)
            self.save_hyperparameters({"denoiser/name": "mine"})

    csv = CSVLogger(tmp_path)
    fit(trainer, tmp_path, Named(), PseudoLabelCallback(), logger=csv)
    assert yaml_of(csv)["denoiser/name"] == "mine"
    assert yaml_of(csv)["denoiser/temperature"] == 1.0


def test_function_as_denoiser(tmp_path: Path, trainer: Any) -> None:
    def mine(p_main: Any, p_aux: Any) -> Any:
        return p_main.argmax(1), torch.ones_like(p_main[:, 0])

    csv = CSVLogger(tmp_path)
    fit(trainer, tmp_path, APLModule(TinyNet(), CLASSES), PseudoLabelCallback(mine), logger=csv)
    assert yaml_of(csv)["denoiser/name"] == "mine"


def test_other_modules_and_trainers_that_log_none(tmp_path: Path, trainer: Any) -> None:
    class Other(pl.LightningModule):
        """A module without logged hyperparameters."""

        class_names = ("0", "1", "2")

        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"secret": 1}, logger=False)
            self.layer = nn.Conv2d(1, CLASSES, 1)

        def forward(self, image: Any) -> Any:
            return self.layer(image), self.layer(image)

        def training_step(self, batch: Any) -> Any:
            return self(batch["image"])[0].mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for enabled in (True, False):
        csv = CSVLogger(tmp_path, version=str(enabled))
        options = {"logger": csv, "enable_autolog_hparams": enabled}
        fit(trainer, tmp_path / str(enabled), Other(), PseudoLabelCallback(), **options)
        assert (Path(csv.log_dir) / "hparams.yaml").exists() == enabled
    found = yaml_of(CSVLogger(tmp_path, version="True"))
    assert found["optimizer/lr"] == 0.1
    assert "secret" not in found


@pytest.mark.parametrize("kind", [kind for kind in DENOISERS if not inspect.isabstract(kind)])
def test_all_options_of_a_denoiser_are_logged(kind: Any) -> None:
    options = inspect.signature(kind).parameters
    assert set(named("denoiser", kind())) == {"denoiser/name", *(f"denoiser/{name}" for name in options)}


@pytest.mark.parametrize(("kind", "mode"), [(APLModule, "auto"), (SelfTrainingModule, "auto"), (TentModule, "train")])
def test_the_mode_of_batch_norm_is_logged(kind: Any, mode: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, CLASSES, 1))
    assert kind(network, CLASSES).hparams_initial["batch_norm"] == mode


def test_scalars_of_numpy_load_again(tmp_path: Path, trainer: Any) -> None:
    module = APLModule(
        TinyNet(),
        np.int64(CLASSES),
        list(np.array(["background", "liver", "spleen"])),
        learning_rate=np.float64(1e-3),
        head_rate=np.float32(0.5),
        ignore_index=np.int64(255),
    )
    fit(trainer, tmp_path, module, PseudoLabelCallback())
    module.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = APLModule.load_from_checkpoint(tmp_path / "saved.ckpt", model=TinyNet(), weights_only=True)
    assert (again.learning_rate, again.head_rate, again.ignore_index) == (1e-3, 0.5, 255)
    assert again.class_names == ["background", "liver", "spleen"]

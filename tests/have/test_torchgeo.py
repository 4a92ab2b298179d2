"""TorchGeo: the code of its page, with look-alikes of its task and its data module."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import CLASSES, TinyNet
from page import code_of, short
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apl_lightning.lightning_pytorch import APLModule, PseudoLabelCallback, TargetDataModule

IMAGES, MASKS = torch.rand(4, 1, 16, 16) * 255, torch.randint(CLASSES, (4, 16, 16))


class Task(L.LightningModule):
    """As torchgeo's: options in `hparams`, the network in `model`, beside a loss with weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = TinyNet(num_classes)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(num_classes))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.criterion(self(batch["image"]), batch["mask"])
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val_loss", self.training_step(batch), batch_size=len(batch["mask"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Data(L.LightningDataModule):
    """As torchgeo's: dictionaries with `mask`, scaled after the transfer."""

    def train_dataloader(self) -> DataLoader[Any]:
        samples = [{"image": image, "mask": mask, "crs": "x"} for image, mask in zip(IMAGES, MASKS, strict=True)]
        return DataLoader(samples, batch_size=2, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataloader().dataset, batch_size=2)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return {**batch, "image": batch["image"] / 255, "mask": batch["mask"].long()}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A trained task, in the file `task.ckpt`."""
    monkeypatch.chdir(tmp_path)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trained, trainer = Task(num_classes=CLASSES), L.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(trained, Data())
    trainer.save_checkpoint("task.ckpt")
    return trained


def test_page(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("torchgeo.trainers")
    package.SemanticSegmentationTask = Task  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchgeo", types.ModuleType("torchgeo"))
    monkeypatch.setitem(sys.modules, "torchgeo.trainers", package)
    scope: dict[str, Any] = {"target_data": Data()}
    exec(short(code_of("torchgeo")), scope)
    assert {"val/dice", "pseudo/dice"} <= set(scope["trainer"].callback_metrics)
    refined = torch.load("refined.pt", weights_only=True)
    assert list(refined) == list(task.model.state_dict())
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(scope["task"].eval()(image), scope["module"].eval()(image).main)
        assert not torch.equal(scope["task"](image), task.eval()(image))


def test_key_given_to_module_and_data(task: Task) -> None:
    """The module reads the batches of the data module, and those of the project, which it logs the same Dice for."""
    module = APLModule(task, CLASSES, label_key="mask")
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[PseudoLabelCallback()], enable_progress_bar=False
    )
    data = TargetDataModule.from_datamodule(Data(), label_key="mask")
    trainer.fit(module, data)
    (ours,) = trainer.validate(module, data, verbose=False)
    samples = [{"image": i / 255, "mask": m, "case": n} for n, (i, m) in enumerate(zip(IMAGES, MASKS, strict=True))]
    (theirs,) = trainer.validate(module, DataLoader(samples, batch_size=2), verbose=False)  # type: ignore[arg-type]
    assert ours == theirs

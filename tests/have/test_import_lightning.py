"""A project that imports lightning: the code of its page refines its module on its data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import CLASSES, Images, TinyNet
from page import code_of, short
from torch import Tensor
from torch.utils.data import DataLoader

import apl_lightning
from apl_lightning import lightning_pytorch


class Project(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNet()

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)
        return logits


class ProjectData(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(labelled=True), batch_size=2, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(labelled=True), batch_size=3)


def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"project": Project(), "project_data": ProjectData()}
    exec(short(code_of("lightning")).replace("apl_lightning.lightning_pytorch", package), scope)
    return scope


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = run_page(tmp_path, monkeypatch, "apl_lightning.lightning_pytorch")
    assert scope["trainer"].global_step == 2 * 2
    assert "val/dice" in scope["trainer"].callback_metrics
    refined, given = torch.load("refined.pt", weights_only=True), scope["project"].network.state_dict()
    assert list(refined) == list(given) == list(TinyNet(CLASSES).state_dict())


def test_the_other_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"`from apl_lightning.lightning_pytorch import \w+`, and so for the module"):
        run_page(tmp_path, monkeypatch, "apl_lightning")


def test_all_names_are_there() -> None:
    assert set(apl_lightning.__all__) <= set(vars(lightning_pytorch))

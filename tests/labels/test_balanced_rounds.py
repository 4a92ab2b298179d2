"""The labels of the first two rounds are balanced where the network hardly knows the target images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Slices, TinyNet
from torch import Tensor

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.denoisers import CBST
from apl_lightning.labels import Labelling

Make = Callable[..., pl.Trainer]

COUNTED = {"ignore_small_components": False}


class Rounds(pl.Callback):
    """Records the labels of each epoch; saves a checkpoint after the first one."""

    def __init__(self, saved: Path) -> None:
        self.saved = saved
        self.labels: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        store = trainer.train_dataloader.dataset.store
        self.labels.append(torch.stack([store.read(index).labels for index in range(store.length)]))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.saved)


@pytest.fixture
def rounds(tmp_path: Path, trainer: Make) -> Callable[..., list[Tensor]]:
    """Run three rounds with fixed weights and return their labels."""

    def run(name: str, resumed: bool = False, batch_norm: Any = "adapt", **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        seen, ckpt_path = Rounds(tmp_path / f"{name}.ckpt"), str(tmp_path / f"{name}.ckpt") if resumed else None
        data = TargetDataModule(Slices(10, "patient"), transform=None, store_dir=tmp_path / name, case_key="patient")
        module = APLModule(TinyNet(), CLASSES, batch_norm=batch_norm, learning_rate=0.0)
        callback = PseudoLabelCallback(guard="off", **options)
        fit = trainer(max_epochs=3, callbacks=[callback, seen]).fit
        fit(module, data, ckpt_path=ckpt_path, weights_only=False if resumed else None)
        return seen.labels

    return run


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_scattered_classes(rounds: Any) -> None:
    """The predictions of a random network on noise are scattered."""
    balanced = rounds("balanced", denoiser=CBST(), ignore_small_components=True)
    plain = rounds("plain", **COUNTED)
    assert not torch.equal(balanced[0], plain[0])
    assert_equal(rounds("ours"), [*balanced[:2], plain[2]])
    assert_equal(rounds("one piece", largest_component_share=0.0), plain)


@pytest.mark.parametrize(("agreement", "is_wide"), [(0.71, True), (0.73, False)])
def test_wide_gap(rounds: Any, monkeypatch: pytest.MonkeyPatch, agreement: float, is_wide: bool) -> None:
    """Both BatchNorm statistics give different predictions; a resumed run remembers it."""
    auto = {"batch_norm": "auto", **COUNTED}
    monkeypatch.setattr(Labelling, "gains", lambda *_: {"pseudo/estimated_gain": 0.1})
    monkeypatch.setattr(Labelling, "agreement", lambda *_: agreement)
    balanced, plain = rounds("balanced", **auto, denoiser=CBST()), rounds("plain", **COUNTED)
    expected = [*balanced[:2], plain[2]] if is_wide else plain
    assert_equal(rounds("ours", **auto), expected)
    monkeypatch.setattr(Labelling, "agreement", None)
    assert_equal(rounds("ours", **auto, resumed=True), expected[1:])

"""Scrambled target labels change no weight, no choice and no figure but the Dice, bit for bit, for every method."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, TinyNet
from torch import Tensor

from apl_lightning import PseudoLabelCallback, TargetDataModule

Make = Callable[..., pl.Trainer]
BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


def recipes() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        module = importlib.import_module("recipes")
    return {**module.RECIPES, **module.MORE}


RECIPES = recipes()


def samples(seed: int) -> list[dict[str, Any]]:
    """The same images of two patients, with labels that depend on the seed."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 32, 32, generator=generator) for _ in range(4)]
    labels = torch.Generator().manual_seed(seed)
    return [
        {"image": image, "label": torch.randint(CLASSES, (32, 32), generator=labels), "case": str(index // 2)}
        for index, image in enumerate(images)
    ]


def run(recipe: Any, folder: Path, make: Make, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.manual_seed(0)
    module = recipe.module(TinyNet(), CLASSES, **recipe.options)
    callback = PseudoLabelCallback(**recipe.callback())
    data = TargetDataModule(samples(seed), samples(seed), batch_size=2, store_dir=folder, **recipe.data)
    trainer = make(max_epochs=2, callbacks=[callback])
    trainer.fit(module, data)
    figures = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return module.state_dict(), figures | callback.statistics


@pytest.mark.parametrize("name", RECIPES)
def test_no_target_label_is_read(tmp_path: Path, trainer: Make, name: str) -> None:
    weights, figures = run(RECIPES[name], tmp_path / "true", trainer, seed=1)
    scrambled, others = run(RECIPES[name], tmp_path / "scrambled", trainer, seed=2)
    for key, value in weights.items():
        assert torch.equal(value, scrambled[key]), key
    assert figures.keys() == others.keys()
    changed = {key for key, value in figures.items() if value != others[key]}
    assert changed
    assert all(key == "pseudo/dice" or key.startswith("val/dice") for key in changed)

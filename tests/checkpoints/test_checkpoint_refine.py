"""Checkpoints of each system in the paper's table can be loaded, refined for two epochs, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.checkpoints import DRN, SIFA, DeepLabV2, ResnetGenerator, Translated, load

pytestmark = pytest.mark.usefixtures("two_threads")

# The name of the system in `load` for each row of the table.
ROWS = {
    "CycleGAN": "synseg",
    "SynSeg-Net": "synseg",
    "AdaOutput": "adaptsegnet",
    "ADVENT": "advent",
    "CyCADA": "cycada",
    "SIFA-v1": "sifa-v1",
    "SIFA-v2": "sifa-v2",
}
# Narrow networks; their official sizes are in `test_checkpoint_golden.py`.
DEEPLAB = {"width": 4, "blocks": (1, 2, 1, 1)}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "adaptsegnet": lambda: DeepLabV2(5, 2, **DEEPLAB),  # type: ignore[arg-type]
    "advent": lambda: DeepLabV2(5, 4, **DEEPLAB),  # type: ignore[arg-type]
    "cycada": lambda: DRN(5, (1, 1, 2, 2, 2, 2, 1, 1), width=8),
    "synseg": lambda: ResnetGenerator(1, 5, width=8),
    "sifa-v1": lambda: SIFA(5, in_channels=3, width=2),
    "sifa-v2": lambda: SIFA(5, lower=True, width=2),
}


def pretrained(row: str, folder: Path) -> nn.Module:
    """Load the network that users of this system start from."""
    system, path = ROWS[row], folder / "model.pth"
    torch.save(NETWORKS[system]().state_dict(), path)
    network = load(system, path)
    if row == "CycleGAN":
        torch.save(ResnetGenerator(1, 1, width=8).state_dict(), path)
        network = Translated(load("cyclegan", path), network)
    path.unlink()
    return network


@pytest.mark.filterwarnings("ignore:Before refinement the two heads agree")  # networks without training
@pytest.mark.parametrize("row", ROWS)
def test_two_epochs(row: str, tmp_path: Path, trainer: Callable[..., pl.Trainer]) -> None:
    torch.manual_seed(2)  # with other seeds, the untrained DRN may be sure of nothing
    network = pretrained(row, tmp_path)
    raw = torch.rand(2, 1, 32, 32)
    images: Any = list(network.preprocess(raw))
    module = APLModule(network, num_classes=5)
    data = TargetDataModule(train=images, batch_size=2)
    callback = PseudoLabelCallback(guard="off")  # these images are noise
    run = trainer(max_epochs=2, callbacks=[callback])
    run.fit(module, data)
    assert run.global_step == 2
    assert 0 < run.callback_metrics["pseudo/confidence"] <= 1
    assert run.callback_metrics["train/loss"].isfinite()

    refined, before = module.export().state_dict(), network.state_dict()
    assert list(refined) == list(before)
    changed = {name for name in refined if not torch.equal(refined[name], before[name])}
    assert any("weight" in name for name in changed)
    assert not any(name.startswith("generator.") for name in changed)
    path = tmp_path / "refined.pth"
    torch.save(refined, path)
    options = {"prefix": "segmenter."} if row == "CycleGAN" else {}
    again = load(ROWS[row], path, **options).state_dict()
    assert all(torch.equal(value, refined[options.get("prefix", "") + name]) for name, value in again.items())

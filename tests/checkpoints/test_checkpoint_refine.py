"""Checkpoints of each system in the paper's table can be loaded, refined for two epochs, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from checkpoint_files import Golden, write_sifa
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.checkpoints import Translated, load

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
FIXTURES = {
    "adaptsegnet": "adaptsegnet_vgg",  # its other backbone has the keys and shapes of ADVENT
    "advent": "advent",
    "cycada": "cycada_drn26",
    "synseg": "synseg_fork_seg_ngf32",
    "sifa-v1": "sifa_v1",
    "sifa-v2": "sifa_v2",
}


def pretrained(row: str, folder: Path) -> nn.Module:
    """Load the network that users of this system start from."""
    system = ROWS[row]
    golden = Golden(FIXTURES[system])
    if system.startswith("sifa"):
        return load(system, write_sifa(folder, golden))
    path = folder / "model.pth"
    torch.save(golden.state_dict(), path)
    network = load(system, path)
    if row == "CycleGAN":
        torch.save(Golden("cyclegan_g1").state_dict(), path)
        network = Translated(load("cyclegan", path), network)
    path.unlink()
    return network


@pytest.mark.parametrize("row", ROWS)
def test_two_epochs(row: str, tmp_path: Path, trainer: Callable[..., pl.Trainer]) -> None:
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

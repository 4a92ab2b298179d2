"""A resumed run continues with the seed of the run, not with that of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, TinyNet
from torch import Tensor, nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule


class DropoutNet(TinyNet):
    """Draws at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.append(nn.Dropout2d(0.3))


@pytest.mark.parametrize("dropout", [False, True])
def test_resumed_under_another_seed(tmp_path: Path, trainer: Any, dropout: bool) -> None:
    """Order and moves of the images come from one seed; without them, dropout shows the other one."""

    def fit(name: str, epochs: int, seed: int, resume: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = DropoutNet()
        torch.manual_seed(seed)
        module = APLModule(network, CLASSES, dropout=dropout, learning_rate=1e-2)
        options: dict[str, Any] = {"batch_size": 8, "transform": None} if dropout else {"batch_size": 2}
        run = trainer(max_epochs=epochs, callbacks=[PseudoLabelCallback(guard="off")])
        data = TargetDataModule(Images(8), store_dir=tmp_path / name, **options)
        run.fit(module, data, ckpt_path=resume, weights_only=None if resume is None else False)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        return module.state_dict()

    whole = fit("whole", 3, seed=1)
    first = fit("parted", 1, seed=1)
    parted = fit("parted", 3, seed=2, resume=tmp_path / "parted.ckpt")
    assert all(torch.equal(parted[name], value) for name, value in whole.items())
    assert not all(torch.equal(first[name], value) for name, value in whole.items())

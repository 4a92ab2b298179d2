"""3D volumes of different sizes on patches: the code of its page, with small numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from page import code_of, short
from phantoms import AFFINES, write


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for case, size in enumerate([(30, 28, 10), (24, 30, 14)]):
        volume = np.random.default_rng(case).uniform(-200, 300, size).astype(np.float32)
        write(Path("images") / f"case{case}.nii.gz", volume, AFFINES["LPS"])
    network = UNet(3, 1, 3, (4, 8), (2,), norm="batch")
    scope: dict[str, Any] = {"network": network}
    exec(short(code_of("volumes")).replace("96, 96, 96", "8, 8, 8"), scope)
    assert scope["trainer"].global_step == 4
    assert {tuple(volume["image"].shape) for volume in scope["volumes"]} == {(1, 13, 12, 12), (1, 10, 13, 17)}
    assert scope["module"].inferer.roi_size == (8, 8, 8)
    refined = torch.load("refined.pt", weights_only=True)
    assert list(refined) == list(network.state_dict())
    assert any(not torch.equal(refined[name], value) for name, value in network.state_dict().items())

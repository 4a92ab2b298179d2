"""ONNX: the model of the page, and that of the command line, compute what the network computes."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import onnx.reference
import pytest
import torch
import yaml
from monai.networks.nets import UNet
from page import PAGES, code_of

from apl_lightning import APLModule
from apl_lightning.cli import main

NETWORK, COMMAND = (
    re.findall(rf"```{kind}\n(.*?)```", (PAGES / "onnx.md").read_text(), re.S)[0] for kind in ("yaml", "bash")
)
ARGUMENTS = shlex.split(COMMAND)[1:]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> APLModule:
    monkeypatch.chdir(tmp_path)
    network = UNet(**yaml.safe_load(NETWORK)["init_args"])
    for buffer in network.buffers():  # BatchNorm that does something
        buffer.add_(torch.rand_like(buffer)) if buffer.is_floating_point() else None
    return APLModule(network, 3)


def test_page(module: APLModule) -> None:
    exec(code_of("onnx"), {"module": module})
    refined, images = module.export(), torch.rand(3, 1, 64, 64)
    Path("network.yaml").write_text(NETWORK)
    torch.save(refined.state_dict(), "refined.pt")
    Path("refined.onnx").rename("page.onnx")
    assert main(ARGUMENTS) == 0
    for name in ("page", "refined"):
        (logits,) = onnx.reference.ReferenceEvaluator(f"{name}.onnx").run(None, {"x": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), refined(images), rtol=1e-4, atol=1e-5)


def test_missing_packages_are_named(
    module: APLModule, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("network.yaml").write_text(NETWORK)
    torch.save(module.export().state_dict(), "refined.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(ARGUMENTS) == 1
    cure = "`pip install -e 'PATH/TO/apl-lightning[onnx]'`"
    assert capsys.readouterr().err == f"apl-lightning: a file .onnx needs onnx: {cure}.\n"
    assert not Path("refined.onnx").exists()

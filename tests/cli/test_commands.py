"""The commands of `apl-lightning`: what they write, and how they fail."""

from __future__ import annotations

import csv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx.reference
import pytest
import torch
import yaml
from monai.networks.nets import UNet
from nifti_project import project
from phantoms import AFFINES, write
from torch import Tensor, nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.cli import main
from apl_lightning.cli.export import export
from apl_lightning.cli.inspect import inspect

__all__ = ["project"]
UNET = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2], "norm": "batch"}
BY_CLASS = [f"--network={yaml.safe_dump({'class_path': 'monai.networks.nets.UNet', 'init_args': UNET})}"]


@pytest.fixture
def network(project: Path) -> nn.Module:
    """The network of `refine.yaml`, made smaller, and its weights in `source.pt`."""
    config = yaml.safe_load(Path("refine.yaml").read_text())
    config["network"]["init_args"]["network"]["init_args"] = UNET
    config["images"]["init_args"]["size"] = [24, 20]
    Path("refine.yaml").write_text(yaml.safe_dump(config))
    network = UNet(**UNET)
    torch.save(network.state_dict(), "source.pt")
    return network


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command, which is one line."""
    capsys.readouterr()
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("apl-lightning: ")
    return lines[-1]


def test_refine_from_folder_to_folder(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--max_epochs", "1", "--steps_per_epoch", "2", "--accelerator", "cpu", "--check", "false"]
    assert main(["refine", "--config", "refine.yaml", *quick]) == 0
    out = Path("refined")
    assert torch.load(out / "refined.pt", weights_only=True).keys() == network.state_dict().keys()
    label = nibabel.load(out / "labels" / "case0.nii.gz")
    assert np.array_equal(label.affine, nibabel.load("images/case0.nii.gz").affine)
    assert {path.name for path in (out / "pictures").iterdir()} == {"case0.png", "case1.png"}
    rows = csv.reader((out / "volumes.csv").read_text().splitlines())
    assert [row[0] for row in rows] == ["case", "case0", "case1"]
    assert "has content" in failure(capsys, "refine", "--config", "refine.yaml", *quick)


def test_predict_and_evaluate(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path("refine.yaml").read_text())
    del config["out"]
    Path("predict.yaml").write_text(yaml.safe_dump(config))
    assert main(["predict", "--config", "predict.yaml", "--out", "before", "--accelerator", "cpu"]) == 0
    assert main(["evaluate", "--predictions", "labels", "--references", "labels", "--out", "scores.csv"]) == 0
    shown = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:4] for line in shown] == [[name, "1.000", "0.00", "0.00"] for name in ("1", "2", "mean")]
    assert len(Path("scores.csv").read_text().splitlines()) == 1 + 2 * 2 + 3
    write(Path("other") / "case9.nii.gz", np.zeros((4, 4, 4), np.uint8), AFFINES["RAS"])
    message = failure(capsys, "evaluate", "--predictions", "before/labels", "--references", "other")
    assert "Expected files of the same names" in message


def test_export(network: nn.Module, trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a trainer's checkpoint: the refined network, as a state dict and as an ONNX model."""
    module = APLModule(network, 3)
    data = TargetDataModule([torch.rand(1, 16, 16) for _ in range(2)], batch_size=2)
    run = trainer(callbacks=[PseudoLabelCallback(guard="off")])
    run.fit(module, data)
    run.save_checkpoint("run.ckpt")
    refined = module.export()
    assert main(["inspect", "--what", "run.ckpt"]) == 0
    assert "a checkpoint of a refinement module" in capsys.readouterr().out
    assert main(["export", *BY_CLASS, "--checkpoint", "run.ckpt", "--out", "plain.pt"]) == 0
    for key, value in torch.load("plain.pt", weights_only=True).items():
        assert torch.equal(value, refined.state_dict()[key]), key
    assert main(["export", *BY_CLASS, "--checkpoint", "run.ckpt", "--out", "plain.onnx", "--size", "[16,24]"]) == 0
    assert "plain.onnx takes images of shape (B, 1, 16, 24)" in capsys.readouterr().out
    images = torch.rand(3, 1, 16, 24)
    (logits,) = onnx.reference.ReferenceEvaluator("plain.onnx").run(None, {"x": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), refined(images), rtol=1e-4, atol=1e-5)
    assert not list(Path().glob("*.onnx.data"))
    assert "plain.pt exists" in failure(capsys, "export", *BY_CLASS, "--checkpoint", "run.ckpt", "--out", "plain.pt")
    message = failure(capsys, "export", "--network", "run.ckpt", "--checkpoint", "run.ckpt", "--out", "new.pt")
    assert "class_path: apl_lightning.checkpoints.load" in message
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), "other.pt")
    message = failure(capsys, "export", *BY_CLASS, "--checkpoint", "other.pt", "--out", "new.pt")
    assert "to contain the" in message
    assert "build the network as it was trained" in message


def test_errors_of_lightning_are_one_line_too(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "refine", "--config", "refine.yaml", "--accelerator", "nonsense", "--check", "false")
    assert "nonsense" in message


def test_inspect(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    what = BY_CLASS[0].replace("--network", "--what")
    assert main(["inspect", what, "--num_classes", "3"]) == 0
    assert "the classifier is 'model.2.conv'" in capsys.readouterr().out
    assert main(["inspect", "--what", "source.pt"]) == 0
    assert "no network of the seven systems" in capsys.readouterr().out
    assert "pass `num_classes`" in failure(capsys, "inspect", what)
    content = yaml.safe_load(Path("refine.yaml").read_text())["network"]["init_args"]["network"]
    heads = {"class_path": "apl_lightning.add_dual_heads", "init_args": {"model": content, "num_classes": 3}}
    Path("heads.yaml").write_text(yaml.safe_dump(heads))
    assert main(["inspect", "--what", "heads.yaml"]) == 0
    assert "UNet: the classifier is 'model.2.conv'" in capsys.readouterr().out
    assert main(["export", "--network", "heads.yaml", "--checkpoint", "source.pt", "--out", "plain.pt"]) == 0
    assert torch.load("plain.pt", weights_only=True).keys() == network.state_dict().keys()
    assert "does not exist" in failure(capsys, "inspect", "--what", "missing.pt")


class OneSize(nn.Module):
    """Learns a position of each pixel, so it takes images of 20 x 36 pixels and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 4, 3, padding=1)
        self.positions = nn.Parameter(torch.rand(1, 4, 20, 36))
        self.classifier = nn.Conv2d(4, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images) + self.positions)
        return logits


def test_a_network_of_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="or to a command `size`"):
        inspect(OneSize(), 3)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 20, 40\).*another `size`"):
        inspect(OneSize(), 3, size=(20, 40))
    inspect(OneSize(), 3, size=(20, 36))
    assert "the classifier is 'classifier'" in capsys.readouterr().out
    torch.save(OneSize().state_dict(), tmp_path / "source.pt")
    export(OneSize(), tmp_path / "source.pt", tmp_path / "plain.onnx", size=(20, 36))
    assert "images of shape (B, 1, 20, 36)" in capsys.readouterr().out


def test_preflight(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path("refine.yaml").read_text())
    Path("check.yaml").write_text(yaml.safe_dump({key: config[key] for key in ("images", "network", "num_classes")}))
    assert main(["preflight", "--config", "check.yaml", "--picture", "seen.png"]) == 0
    assert "views" in capsys.readouterr().out
    assert Path("seen.png").stat().st_size > 0
    assert main(["preflight", "--config", "check.yaml", "--picture", "seen.png"]) != 0
    text = capsys.readouterr()
    assert "Expected a new file, but seen.png exists" in text.err
    assert "views" not in text.out


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refine", "--nonsense", "1"]) == 2
    assert main([]) == 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("refine", "predict", "evaluate", "export", "inspect", "preflight", "nnunet"):
        assert command in shown
    assert "results folder" in failure(capsys, "nnunet", "--results_folder", ".", "--images", ".", "--out", "refined")
    assert main(["predict", "--help"]) == 0
    assert "][apl_lightning" not in capsys.readouterr().out


def test_network_in_a_file_of_its_own(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    """Its class and arguments in YAML, for every command that takes a network."""
    Path("network.yaml").write_text(yaml.safe_dump({"class_path": "monai.networks.nets.UNet", "init_args": UNET}))
    assert main(["inspect", "--what", "network.yaml", "--num_classes", "3"]) == 0
    assert "the classifier is 'model.2.conv'" in capsys.readouterr().out
    config = yaml.safe_load(Path("refine.yaml").read_text())
    given = {key: config[key] for key in ("images", "num_classes")} | {"network": "network.yaml"}
    Path("check.yaml").write_text(yaml.safe_dump(given))
    assert main(["preflight", "--config", "check.yaml"]) == 0


def test_errors_say_what_to_do(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path("refine.yaml").read_text())
    config["network"]["init_args"]["path"] = "missing.pt"
    Path("missing.yaml").write_text(yaml.safe_dump(config))
    message = failure(capsys, "refine", "--config", "missing.yaml")
    assert message == "apl-lightning: Expected a checkpoint, but the file missing.pt does not exist."
    assert main(["predict", "--config", "refine.yaml", "--patch_size", "16,16"]) == 2
    assert 'A list stands in brackets and quotes: "[32,32]".' in capsys.readouterr().err
    Path("names.yaml").write_text("class_names: [background, 1]")  # a list, but not of text
    assert main(["predict", "--config", "names.yaml"]) == 2
    assert "in brackets" not in capsys.readouterr().err


def test_help_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refine", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "known subclasses" not in shown
    assert "--num_classes NUM_CLASSES" in shown
    assert len(shown.splitlines()) < 150
    assert main(["--version"]) == 0
    assert version("apl-lightning") in capsys.readouterr().out

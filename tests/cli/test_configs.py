"""`LightningCLI(APLModule, TargetDataModule)` with the YAML files of the examples, in both packages of Lightning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from monai.networks.nets import UNet
from nifti_project import project

from apl_lightning.checkpoints import load_weights

__all__ = ["project"]

SCRIPT = Path(__file__).parents[2] / "examples" / "configs" / "lightning_cli.py"
PACKAGES = {
    "pytorch_lightning": "apl_lightning",
    "lightning.pytorch": "apl_lightning.lightning_pytorch",
}


def network_of(config: Any) -> UNet:
    arguments = (config.get("model", {}).get("model") or config["network"])["init_args"]["network"]["init_args"]
    return UNet(**arguments)


def run(package: str, *arguments: str) -> Any:
    """Run the script of the examples, in one of the two packages; returns its `LightningCLI`."""
    text = SCRIPT.read_text().replace("from apl_lightning", f"from {PACKAGES[package]}")
    script = {"__name__": "__main__"}
    with warnings.catch_warnings(), patch("sys.argv", [str(SCRIPT), *arguments]):
        warnings.filterwarnings("ignore", "Seed set|ModelCheckpoint")
        exec(compile(text.replace("from pytorch_lightning", f"from {package}"), SCRIPT, "exec"), script)
    return script["cli"]


@pytest.mark.parametrize("package", PACKAGES)
def test_help_names_the_arguments(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(package, "fit", "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for argument in ("--model.head_rate", "--data.patch_size", "--data.transform", "--model.inferer"):
        assert argument in shown


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["slices", "volumes"])
def test_configs_run(package: str, name: str, project: Path) -> None:
    path = project / f"{name}.yaml"
    config = yaml.safe_load(path.read_text().replace("pytorch_lightning.", f"{package}."))
    if package != "pytorch_lightning":
        text = yaml.safe_dump(config).replace("apl_lightning.Pseudo", "apl_lightning.lightning_pytorch.Pseudo")
        config = yaml.safe_load(text)
    config["data"]["train"]["init_args"].update({"size": [24, 24]} if name == "slices" else {"spacing": [2, 2, 2]})
    config["data"].update({} if name == "slices" else {"patch_size": [12, 12, 12], "steps_per_epoch": 2})
    # So that the last checkpoint is the network that the run ends with.
    config["trainer"]["callbacks"][0].setdefault("init_args", {})["guard"] = "warn"
    config["model"]["model"]["init_args"]["network"]["init_args"].update(channels=[4, 8], strides=[2])
    path.write_text(yaml.safe_dump(config))
    source = network_of(config)
    torch.save(source.state_dict(), "source.pt")
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    overrides = [f"--trainer.{key}={str(value).lower()}" for key, value in options.items()]
    cli = run(package, "fit", "--config", str(path), *overrides)
    assert type(cli.model).__module__.startswith(PACKAGES[package])
    assert type(cli.trainer.callbacks[0].denoiser).__name__ == ("APL" if name == "slices" else "CBST")
    assert cli.trainer.global_step > 0
    saved = Path(cli.trainer.checkpoint_callback.last_model_path)
    for file in (saved, project / "refined.pt"):
        refined = load_weights(network_of(config), file)
        for key, value in cli.model.export().state_dict().items():
            assert torch.equal(value, refined.state_dict()[key]), key
    for written in project.rglob("config.yaml"):  # with a logger; what was run can be run again
        assert "Unable to serialize" not in written.read_text()
        with pytest.raises(SystemExit) as end:
            run(package, "fit", "--config", str(written), "--print_config")
        assert end.value.code == 0
    assert name == "volumes" or len(list(project.rglob("config.yaml"))) == 1

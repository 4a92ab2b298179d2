"""`LightningCLI(APLModule, TargetDataModule)` with the YAML files of the examples, in both packages of Lightning."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.networks.nets import UNet
from nifti_project import project

from apl_lightning.checkpoints import load_weights

__all__ = ["project"]

PACKAGES = {
    "pytorch_lightning": "apl_lightning",
    "lightning.pytorch": "apl_lightning.lightning_pytorch",
}


def network_of(config: Any) -> UNet:
    arguments = (config.get("model", {}).get("model") or config["network"])["init_args"]["network"]["init_args"]
    return UNet(**arguments)


def run(package: str, *arguments: str) -> Any:
    """What a three-line script with `LightningCLI` does."""
    ours = importlib.import_module(PACKAGES[package])
    cli = importlib.import_module(f"{package}.cli").LightningCLI
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        warnings.filterwarnings("ignore", "Seed set|ModelCheckpoint")
        return cli(ours.APLModule, ours.TargetDataModule, args=list(arguments))


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
    refined = load_weights(network_of(config), saved)
    for key, value in cli.model.export().state_dict().items():
        assert torch.equal(value, refined.state_dict()[key]), key
    for written in project.rglob("config.yaml"):  # with a logger; what was run can be run again
        assert "Unable to serialize" not in written.read_text()
        with pytest.raises(SystemExit) as end:
            run(package, "fit", "--config", str(written), "--print_config")
        assert end.value.code == 0
    assert name == "volumes" or len(list(project.rglob("config.yaml"))) == 1

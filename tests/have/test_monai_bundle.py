"""The MONAI bundle of the examples is refined by the code of its page, and MONAI loads the result."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from page import PAGES, code_of
from phantoms import AFFINES, write

BUNDLE = Path(__file__).parents[2] / "examples/configs/monai_bundle"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigParser:
    """A copy of the bundle with a source network and two volumes of different sizes, and its configuration."""
    shutil.copytree(BUNDLE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for case, size in enumerate([(20, 18, 16), (16, 22, 20)]):
        volume = np.random.default_rng(case).uniform(-200, 300, size).astype(np.float32)
        write(Path("target_images") / f"case{case}.nii.gz", volume, AFFINES["LPS"])
    config = yaml.safe_load(Path("configs/refine.yaml").read_text())
    config["data"].update(patch_size=[16, 16, 16], steps_per_epoch=1)
    config["trainer"].update(max_epochs=1, accelerator="cpu")
    Path("configs/refine.yaml").write_text(yaml.safe_dump(config))
    found = ConfigParser(ConfigParser.load_config_file("configs/inference.json"))
    Path("models").mkdir()
    torch.save({"model": found.get_parsed_content("network_def").state_dict()}, "models/model.pt")
    return found


def test_page(bundle: ConfigParser) -> None:
    lines = code_of("monai").splitlines() + (BUNDLE / "configs/refine.yaml").read_text().splitlines()
    assert len([line for line in lines if line]) <= 15
    scope: dict[str, Any] = {}
    exec(code_of("monai"), scope)
    source, refined = (torch.load(f"models/{name}.pt", weights_only=True) for name in ("model", "refined"))
    assert list(refined) == list(source["model"])
    assert any(not torch.equal(refined[name], value) for name, value in source["model"].items())


def test_bundle_is_complete(bundle: ConfigParser) -> None:
    """What refine.yaml takes from inference.json exists, and the documentation says so."""
    text = (BUNDLE / "configs/refine.yaml").read_text()
    taken = {name for name in re.findall(r"@(\w+)", text) if name not in yaml.safe_load(text)}
    page = (PAGES / "monai.md").read_text()
    assert taken == {"network_def", "dataset", "inferer"}
    for name in taken:
        assert f"`{name}`" in page
    (sample, _) = bundle.get_parsed_content("dataset")
    assert sample["image"].shape == (1, 9, 8, 20)  # (size - 1) * mm / 2 + 1, rounded
    outputs = ConfigParser.load_config_file("configs/metadata.json")["network_data_format"]["outputs"]
    assert outputs["pred"]["num_channels"] == bundle["network_def"]["out_channels"]

"""A folder as a user of the command line has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from phantoms import AFFINES, blobs, write

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the YAML files of the examples, `images` and `labels`."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for case in range(2):
        labels = blobs((24, 20, 9), AFFINES["LPS"])
        image = labels + random.normal(0, 0.3, labels.shape)
        write(Path("images") / f"case{case}.nii.gz", image.astype(np.float32), AFFINES["LPS"])
        write(Path("labels") / f"case{case}.nii.gz", labels, AFFINES["LPS"])
    for name in ("slices.yaml", "volumes.yaml", "refine.yaml"):
        shutil.copy(CONFIGS / name, name)
    return tmp_path

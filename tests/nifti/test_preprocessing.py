"""What becomes of intensities and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantoms import AFFINES, write

from apl_lightning.data import NiftiFolder


def test_channels_have_their_own_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 1, (5, 6, 7)).astype(np.float32)
    for channel, image in enumerate((values, 1000 + 50 * values)):
        write(tmp_path / f"a_{channel:04d}.nii.gz", image, AFFINES["RAS"])
    for options in ({"percentiles": (1, 99)}, {"normalize": True}):
        first, second = NiftiFolder(tmp_path, channels=2, **options)[0]["image"]
        torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


def test_window_clips(tmp_path: Path) -> None:
    write(tmp_path / "a.nii", np.linspace(-1000, 1000, 27).reshape(3, 3, 3).astype(np.float32), AFFINES["RAS"])
    image = NiftiFolder(tmp_path, window=(-160, 240))[0]["image"]
    assert (image.min(), image.max()) == (0, 1)


@pytest.mark.parametrize(
    ("plane", "shape", "count"), [("sagittal", (12, 10), 4), ("coronal", (12, 10), 5), ("axial", (12, 10), 6)]
)
def test_size_of_slices(tmp_path: Path, plane: Any, shape: tuple[int, int], count: int) -> None:
    write(tmp_path / "a.nii", np.random.default_rng(0).random((4, 5, 6)).astype(np.float32), AFFINES["RAS"])
    folder = NiftiFolder(tmp_path, plane=plane, size=shape)
    assert len(folder) == count
    assert folder[0]["image"].shape == (1, *shape)

"""Which files make the cases of an nnU-Net, and what is said of others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apl_lightning.nnunet.target_cases import find_cases


def plan(channels: int, ending: str = ".nii.gz") -> Any:
    return SimpleNamespace(channels=channels, dataset={"file_ending": ending})


@pytest.mark.parametrize(
    ("files", "channels", "ending", "cases"),
    [
        (["a_0000.nii.gz", "b_0000.nii.gz", "dataset.json"], 1, ".nii.gz", {"a": 1, "b": 1}),
        (["a_0000.nii.gz", "._a_0000.nii.gz"], 1, ".nii.gz", {"a": 1}),  # copied from a Mac
        (["a_0000.nii.gz", "a_0001.nii.gz"], 2, ".nii.gz", {"a": 2}),
        (["a_0000.png"], 3, ".png", {"a": 1}),  # red, green and blue in one file
    ],
)
def test_files_make_cases(tmp_path: Path, files: list[str], channels: int, ending: str, cases: dict[str, int]) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = find_cases(tmp_path, plan(channels, ending))
    assert {case: len(images) for case, images in found.items()} == cases


@pytest.mark.parametrize("other", ["b_0000.nii", "c.nii.gz"])
def test_no_image_is_left_out_without_a_word(tmp_path: Path, other: str) -> None:
    for name in ("a_0000.nii.gz", other):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"but got .*{other}.*rename, convert or remove them"):
        find_cases(tmp_path, plan(1))

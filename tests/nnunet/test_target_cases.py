"""Which files make the cases of an nnU-Net, and what is said of others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apl_lightning.nnunet.target_cases import find_cases, preprocess


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


@pytest.mark.parametrize("other", ["b_0000.nii", "c.nii.gz", "b_0000.NII.GZ", "b_0000.nrrd", "b_0000.mha"])
def test_no_image_is_left_out_without_a_word(tmp_path: Path, other: str) -> None:
    for name in ("a_0000.nii.gz", other):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"but got .*{other}.*rename, convert or remove them"):
        find_cases(tmp_path, plan(1))


def test_pictures_and_folders_beside_the_images(tmp_path: Path) -> None:
    for name in ("a_0000.nii.gz", "preview.png"):
        (tmp_path / name).touch()
    (tmp_path / "b_0000.nii.gz").mkdir()
    assert list(find_cases(tmp_path, plan(1))) == ["a"]


def test_one_case_without_a_channel_that_others_have(tmp_path: Path) -> None:
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"Expected 2 files for each case.*but b has \['b_0000.nii.gz'\]"):
        find_cases(tmp_path, plan(2))


class Preprocessor:
    """Gives an image, or raises, as nnU-Net's preprocessors do."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def run_case(self, *arguments: Any) -> tuple[Any, None, None]:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result, None, None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (RuntimeError(), r"read 1 channels of one shape from \['a_0000.nii.gz'\], but it raised RuntimeError: mend"),
        (IndexError("list index"), r"but it raised IndexError: list index: mend or remove"),
        (np.full((1, 2, 2, 2), np.nan), r"finite intensities in a, but \['a_0000.nii.gz'\] has others"),
        (np.zeros((2, 2, 2, 2)), r"Expected 1 channels of each case, but a has 2"),
    ],
)
def test_a_case_that_cannot_be_read_is_named(tmp_path: Path, result: Any, message: str) -> None:
    found = plan(1)
    found.plans = None
    found.configuration = SimpleNamespace(preprocessor_class=lambda verbose: Preprocessor(result))
    with pytest.raises(ValueError, match=message):
        preprocess({"a": [tmp_path / "a_0000.nii.gz"]}, found, tmp_path / "images")

"""The target images as nnU-Net names and preprocesses them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from apl_lightning.nnunet.network import Plan


class PreprocessedCases(Dataset[dict[str, Any]]):
    """Preprocessed cases in `.npy` files (C, Z, Y, X): whole volumes `{"image"}`, or slices `{"image", "case"}`.

    Args:
        files: The file of each case.
        slices: Whether a sample is a slice (C, Y, X), as networks in 2D see it, and not a volume.
    """

    def __init__(self, files: Iterable[Path], slices: bool) -> None:
        self._samples: list[tuple[Path, int | None]] = []
        for file in files:
            depth = np.load(file, mmap_mode="r").shape[1]
            self._samples += [(file, z) for z in range(depth)] if slices else [(file, None)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, z = self._samples[index]
        volume = np.load(file, mmap_mode="r")
        if z is None:
            return {"image": torch.from_numpy(np.array(volume))}
        return {"image": torch.from_numpy(np.array(volume[:, z])), "case": file.stem}


def find_cases(folder: Path, plan: Plan) -> dict[str, list[Path]]:
    """The image files of each case, one per channel, named as nnU-Net wants them: `case_0000.nii.gz`.

    One file may hold all channels, such as the colours of a photograph.

    Raises:
        ValueError: If there is no folder, or no image in it, a case lacks a channel, or an image has another name.
    """
    ending = plan.dataset["file_ending"]
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(ending))
    if not folder.is_dir():
        raise ValueError(f"Expected `images` to be a folder, but there is none at {folder}: pass its path.")
    found = sorted(path.name for path in folder.glob("[!.]*") if path.is_file())
    matches = [match for name in found if (match := pattern.fullmatch(name))]
    if not matches:
        raise ValueError(
            f"Expected `images` to be a folder with files named as nnU-Net wants them, case_0000{ending} for the first "
            f"channel, but {folder} has {found[:3] or 'no files'}: rename or convert them."
        )
    named = {match[0] for match in matches}
    looks_like_one = re.compile(r".+(_\d{4}\..+|" + re.escape(ending) + r"|\.nii(\.gz)?)", re.IGNORECASE)
    if others := [name for name in found if name not in named and looks_like_one.fullmatch(name)]:
        raise ValueError(
            f"Expected all images of {folder} to be named as nnU-Net wants them, case_0000{ending} for the first "
            f"channel, but got {others[:3]}: rename, convert or remove them."
        )
    cases: dict[str, list[Path]] = {}
    for match in matches:
        cases.setdefault(match[1], []).append(folder / match[0])
    expected = [f"_{channel:04}{ending}" for channel in range(plan.channels)]
    has_all_in_one = all(len(files) == 1 for files in cases.values())
    for case, files in cases.items():
        if [file.name.removeprefix(case) for file in files] != (expected[:1] if has_all_in_one else expected):
            raise ValueError(
                f"Expected {plan.channels} files for each case, one per channel, but {case} has "
                f"{[file.name for file in files]}: add or remove files, so that they end in {', '.join(expected)}."
            )
    return cases


def preprocess(cases: dict[str, list[Path]], plan: Plan, folder: Path) -> PreprocessedCases:
    """Crop, normalise and resample each case with nnU-Net's own preprocessor; the results go to the new `folder`."""
    folder.mkdir()
    preprocessor = plan.configuration.preprocessor_class(verbose=False)
    files = []
    for case, images in tqdm(cases.items(), desc="Preprocessing", leave=False, dynamic_ncols=True):
        volume = _preprocess_case(preprocessor, case, images, plan)
        files.append(folder / f"{case}.npy")
        np.save(files[-1], volume.astype(np.float32, copy=False))
    return PreprocessedCases(files, slices=len(plan.patch_size) == 2)


def _preprocess_case(preprocessor: Any, case: str, images: list[Path], plan: Plan) -> Any:
    """The array (C, Z, Y, X) of a case; a `ValueError` that names its files if nnU-Net cannot use them."""
    paths, names = [str(image) for image in images], [image.name for image in images]
    try:
        volume, _, _ = preprocessor.run_case(paths, None, plan.plans, plan.configuration, plan.dataset)
    except Exception as error:  # readers raise anything, and some print why
        raise ValueError(
            f"Expected nnU-Net to read {plan.channels} channels of one shape from {names}, but it raised "
            f"{type(error).__name__}{f': {error}' if str(error) else ''}: mend or remove these files."
        ) from error
    if len(volume) != plan.channels:
        raise ValueError(
            f"Expected {plan.channels} channels of each case, but {case} has {len(volume)} in {names}: add files, "
            "one per channel."
        )
    if not np.isfinite(volume).all():
        raise ValueError(f"Expected finite intensities in {case}, but {names} has others: replace them.")
    return volume

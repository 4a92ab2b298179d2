"""A results folder of nnU-Net v2: plans, description of the data set, and a checkpoint per fold."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from apl_lightning._support.files import save
from apl_lightning._support.numpy_numbers import numpy_numbers

_REQUIRED = ("plans.json", "dataset.json")
_OPTIONAL = ("dataset_fingerprint.json",)
_FOLD = re.compile(r"fold_(0|[1-9]\d*|all)")  # and not the `fold_0_old` that somebody has kept


def find_folds(folder: Path, folds: Sequence[int | str] | int | str | None, checkpoint: str) -> list[str]:
    """The names of the folds to refine (`fold_0`, say), by default of all that have the checkpoint.

    Raises:
        ValueError: If the folder is no results folder, or a fold or its checkpoint is missing.
    """
    if missing := [name for name in _REQUIRED if not (folder / name).is_file()]:
        raise ValueError(
            "Expected `results_folder` to be the results folder of a trained nnU-Net v2, with plans.json, dataset.json "
            f"and fold_0, but {folder} has no {missing[0]}: pass the folder that is named after the trainer, the plans "
            "and the configuration, such as nnUNetTrainer__nnUNetPlans__3d_fullres."
        )
    folds = [folds] if isinstance(folds, int | str | np.integer) else folds
    having = sorted(path.parent.name for path in folder.glob(f"fold_*/{checkpoint}"))
    present = [name for name in having if _FOLD.fullmatch(name)]
    given = present if folds is None else [f"fold_{str(fold).removeprefix('fold_')}" for fold in folds]
    names = list(dict.fromkeys(given))
    if not names or not set(names) <= set(present):
        others = sorted({path.name for path in folder.glob("fold_*/*.pth")} - {checkpoint})
        cure = f"pass checkpoint={others[0]!r}" if others and not present else "pass other `folds`"
        raise ValueError(
            f"Expected {checkpoint} in {', '.join(names) or 'fold_0, ...'} of {folder}, but the folds that have it are "
            f"{', '.join(present) or 'none'}: {cure}."
        )
    return names


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint of a fold, on the CPU. No code in the file is executed.

    Raises:
        ValueError: If it is no checkpoint of nnU-Net v2, or contains objects other than tensors and numbers.
    """
    try:
        with torch.serialization.safe_globals(numpy_numbers()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"Expected {path} to be a checkpoint of nnU-Net v2, which holds tensors, text and numbers, but reading it "
            f"without executing code from it failed ({named[1] if named else type(error).__name__}): copy it again, "
            "or take out of it what nnU-Net has not written."
        ) from error
    needed = {"network_weights", "init_args", "trainer_name"}
    if not isinstance(checkpoint, dict) or not needed <= set(checkpoint):
        raise ValueError(f"Expected {path} to be a checkpoint of nnU-Net v2, but it has no {sorted(needed)}.")
    return checkpoint


def copy_plans(folder: Path, out: Path) -> None:
    """Copy the plans and the description of the data set."""
    for name in (*_REQUIRED, *_OPTIONAL):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def write_checkpoint(checkpoint: dict[str, Any], network: nn.Module, path: Path) -> None:
    """Write a checkpoint with the weights of `network`, and everything else as it was read."""
    path.parent.mkdir(exist_ok=True)
    save({**checkpoint, "network_weights": network.cpu().state_dict()}, path)

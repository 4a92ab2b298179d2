"""Cross-validation over patients: folders of data in which every patient is held out once."""

import json
from pathlib import Path
from typing import Any

from slices import read_meta


def fold_of(data: Path, folder: Path, fold: int, folds: int) -> Path:
    """Write a `meta.json` that holds out every n-th patient of both modalities, and return its folder.

    The patients of the splits for training and for validation are pooled. Others, such as a test split, stay unused.
    The files of the volumes stay where they are.
    """
    meta: dict[str, Any] = read_meta(data)
    cases = [{**case, "file": str((data / case["file"]).resolve())} for case in meta["cases"]]
    split: dict[str, list[str]] = {}
    for train, held_out in (("source_train", "source_val"), ("target_adapt", "target_val")):
        patients = sorted([*meta["split"][train], *meta["split"][held_out]])
        split[held_out] = patients[fold::folds]
        split[train] = [patient for patient in patients if patient not in split[held_out]]
        if not split[held_out] or not split[train]:
            raise SystemExit(f"Expected patients for {folds} folds in {data}, but got {patients}: pass fewer --folds.")
    path = folder / data.name / "meta.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**meta, "cases": cases, "split": split}, indent=1))
    return path.parent

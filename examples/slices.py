"""Volumes of two modalities as 2D slices, split by patient.

The folder contains `meta.json` (label names, split by patient, file, domain and voxel spacing of each case) and one
`npz` per patient with `image` and `label`, both of shape (slices, rows, columns). `examples/prepare_abdomen.py` writes
such a folder.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


def read_meta(root: Path) -> dict[str, Any]:
    """Read `meta.json`."""
    meta: dict[str, Any] = json.loads((Path(root) / "meta.json").read_text())
    return meta


def class_names(root: Path) -> list[str]:
    """The names of the classes, background included, in the order of the labels."""
    labels = read_meta(root)["labels"]
    return [labels[number] for number in sorted(labels, key=int)]


def read_volume(path: Path, size: int) -> tuple[Tensor, Tensor]:
    """Read one patient.

    Returns:
        images (slices, 1, size, size), each volume scaled to [0, 1] between its 1st and 99.5th percentile, and
        labels (slices, size, size).
    """
    with np.load(path) as arrays:
        image = torch.from_numpy(arrays["image"].astype(np.float32))[:, None]
        label = torch.from_numpy(arrays["label"].astype(np.int64))
    low, high = np.percentile(image.numpy(), [1, 99.5])
    image = ((image - low) / (high - low)).clamp(0, 1)
    image = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    image = image.clamp(0, 1)  # interpolation may round to above 1
    label = F.interpolate(label[:, None].float(), size=(size, size), mode="nearest-exact")[:, 0].long()
    return image, label


class Slices(Dataset[dict[str, object]]):
    """All slices of one split as dictionaries with `image`, `case` and, if labelled, `label`.

    All slices of a file are used: selecting those with an organ would require target labels. `prepare_abdomen.py` has
    trimmed CT volumes to the organs and 5 slices on either side, as the authors of SIFA have, by the reference labels.

    Args:
        root: Folder that contains `meta.json`.
        split: A split in `meta.json`, such as `source_train` or `target_adapt`.
        size: Number of rows and columns of a slice.
        labelled: Whether samples have a label; `False` for refinement.
        fraction: Fraction of the patients to read, at least one patient; for smoke tests.
        every: Use only every n-th slice.

    Raises:
        ValueError: If the folder has no such split.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        size: int = 128,
        labelled: bool = True,
        fraction: float = 1.0,
        every: int = 1,
    ) -> None:
        meta = read_meta(root)
        cases = {case["id"]: case for case in meta["cases"]}
        if split not in meta["split"]:
            raise ValueError(f"Expected the split {split!r} in {root}/meta.json, but it has {list(meta['split'])}.")
        patients = meta["split"][split]
        patients = patients[: max(1, round(fraction * len(patients)))]
        files = [Path(root) / cases[patient]["file"] for patient in patients]
        volumes = [[part[::every] for part in read_volume(file, size)] for file in files]
        self.images = torch.cat([image for image, _ in volumes])
        self.labels = torch.cat([label for _, label in volumes]) if labelled else None
        self.cases = [patient for patient, (image, _) in zip(patients, volumes, strict=True) for _ in image]
        self.class_names = class_names(root)
        self.spacing = {patient: _spacing(cases[patient], size, every) for patient in patients}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        sample: dict[str, object] = {"image": self.images[index], "case": self.cases[index]}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        return sample


def _spacing(case: dict[str, Any], size: int, every: int) -> tuple[float, float, float]:
    """The distances in mm between slices, rows and columns of a resized volume."""
    (_, rows, columns), (between, row, column) = case["shape"], case["spacing_zyx_mm"]
    return between * every, row * rows / size, column * columns / size

"""CHAOS MR and BTCV CT volumes of the abdomen as 2D slices, split by patient.

The folder contains `meta.json` (label names, split by patient) and one `npz` per patient with `image` and `label`,
both of shape (slices, rows, columns).
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

CLASS_NAMES = ["background", "liver", "right kidney", "left kidney", "spleen"]


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
    label = F.interpolate(label[:, None].float(), size=(size, size), mode="nearest-exact")[:, 0].long()
    return image, label


class AbdomenSlices(Dataset[dict[str, object]]):
    """All slices of one split as dictionaries with `image`, `case` and, if labelled, `label`.

    All slices of a patient are used: selecting those with an organ would require target labels.

    Args:
        root: Folder that contains `meta.json`.
        split: `source_train`, `source_val`, `target_adapt`, `target_val` or `target_test`.
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
        meta = json.loads((Path(root) / "meta.json").read_text())
        files = {case["id"]: Path(root) / case["file"] for case in meta["cases"]}
        if split not in meta["split"]:
            raise ValueError(f"Expected the split {split!r} in {root}/meta.json, but it has {list(meta['split'])}.")
        patients = meta["split"][split]
        patients = patients[: max(1, round(fraction * len(patients)))]
        volumes = [[part[::every] for part in read_volume(files[patient], size)] for patient in patients]
        self.images = torch.cat([image for image, _ in volumes])
        self.labels = torch.cat([label for _, label in volumes]) if labelled else None
        self.cases = [patient for patient, (image, _) in zip(patients, volumes, strict=True) for _ in image]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        sample: dict[str, object] = {"image": self.images[index], "case": self.cases[index]}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        return sample

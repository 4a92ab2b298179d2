"""The folder of results: label maps, volumes and pictures."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from apl_lightning.folders.pictures import save_picture
from apl_lightning.nifti import NiftiFolder, read_grid, read_image, save_labels
from apl_lightning.refinement import RefinementModule


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a new table."""
    with path.open("x", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_predictions(
    module: RefinementModule, folder: NiftiFolder, out: Path, batch_size: int, device: torch.device
) -> None:
    """Write `labels/<case>.nii.gz`, `pictures/<case>.png` and `volumes.csv`, in ml."""
    for name in ("labels", "pictures"):
        (out / name).mkdir(parents=True, exist_ok=True)
    module.to(device).eval()
    names, rows = module.class_names, []
    for index, case in enumerate(tqdm(folder.cases, "Predicting", disable=None)):
        labels = folder.labels_in_file(index, _predict(module, folder, index, batch_size, device))
        save_labels(labels, case.images[0], out / "labels" / f"{case.name}.nii.gz")
        grid, plane = read_grid(case.images[0]), folder.preprocessing.plane or "axial"
        picture = out / "pictures" / f"{case.name}.png"
        save_picture(picture, case.name, read_image(case.images[:1])[0], labels, grid, names, plane)
        rows.append(
            [case.name, *(round(grid.voxel_volume * int((labels == c).sum()), 4) for c in range(1, len(names)))]
        )
    write_csv(out / "volumes.csv", ["case", *(f"{name}_ml" for name in names[1:])], rows)


@torch.no_grad()
def _predict(
    module: RefinementModule, folder: NiftiFolder, case: int, batch_size: int, device: torch.device
) -> list[Tensor]:
    """The label maps of all samples of a case."""
    indices, labels = folder.samples_of(case), []
    for start in range(0, len(indices), batch_size):
        images = torch.stack([folder[index]["image"] for index in indices[start : start + batch_size]])
        try:
            predicted = module.predict_step(images.to(device))
        except Exception as error:  # a network may raise anything about a size
            raise ValueError(
                f"Expected the network to accept images of shape (C, *S) = {tuple(images.shape[1:])}, those of case "
                f"{folder.cases[case].name!r}, but it raised {type(error).__name__}: {str(error).rstrip('.')}. If the "
                "size is the reason, pass `patch_size`, or `size` to `NiftiFolder`."
            ) from error
        assert isinstance(predicted, Tensor)
        labels += list(predicted.cpu())
    return labels

"""Distances between surfaces, per patient, with MONAI."""

from typing import Any

import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from torch import Tensor


def surface_distances(predictions: list[Tensor], dataset: Any, class_names: list[str]) -> dict[str, dict[str, Any]]:
    """ASSD and HD95 in mm of each patient and class, from label maps of its slices; None if one of both is empty."""
    found: dict[str, dict[str, Any]] = {}
    for patient, spacing in dataset.spacing.items():
        slices = [index for index, case in enumerate(dataset.cases) if case == patient]
        ours = torch.stack([predictions[index] for index in slices])
        reference = torch.stack([dataset.labels[index] for index in slices])
        found[patient] = {
            name: _distances(ours == number, reference == number, spacing)
            for number, name in enumerate(class_names)
            if number > 0
        }
    return found


def _distances(ours: Tensor, reference: Tensor, spacing: tuple[float, ...]) -> dict[str, float | None]:
    """The distances of two masks (slices, rows, columns)."""
    if not (ours.any() and reference.any()):
        return {"assd": None, "hd95": None}
    pair = ours[None, None].float(), reference[None, None].float()
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    return {
        "assd": float(compute_average_surface_distance(*pair, symmetric=True, **options)),
        "hd95": float(compute_hausdorff_distance(*pair, percentile=95, **options)),
    }

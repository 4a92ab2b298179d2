"""A figure with one row per image and one column per network."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from apl_lightning.visualize import overlay


def fullest_slice(dataset: Any, patient: str | None = None) -> int:
    """The index of the slice, of a patient or of all, in which the smallest organ has most pixels."""
    classes = len(dataset.class_names)
    sizes = {
        index: torch.bincount(dataset[index]["label"].flatten(), minlength=classes)[1:].min()
        for index, case in enumerate(dataset.cases)
        if patient in (None, case)
    }
    return max(sizes, key=lambda index: sizes[index])


def save_panel(
    path: Path, images: list[Tensor], columns: dict[str, list[Tensor]], names: list[str] | None = None
) -> None:
    """Draw each image (C, H, W), followed by its label maps (H, W) as overlays.

    Args:
        path: The PNG file.
        images: One image per row.
        columns: Column titles and their label maps, one map per row.
        names: Titles of the rows, drawn into the images.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = 1 + len(columns), len(images)
    figure, axes = plt.subplots(height, width, figsize=(2.4 * width, 2.5 * height), squeeze=False)
    for row, image in zip(axes, images, strict=True):
        row[0].imshow(image.mean(0).numpy(), cmap="gray")
    axes[0, 0].set_title("target image")
    for axis, name in zip(axes[:, 0], names or [""] * height, strict=True):
        axis.text(0.03, 0.97, name, color="white", transform=axis.transAxes, va="top", fontsize="large")
    for column, (title, labels) in enumerate(columns.items(), start=1):
        axes[0, column].set_title(title)
        for row, image, label in zip(axes, images, labels, strict=True):
            row[column].imshow(overlay(image, label))
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

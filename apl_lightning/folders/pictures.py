"""A picture of the labels of a case."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from apl_lightning.nifti import Array, Grid, Plane, package
from apl_lightning.visualize import COLOURS, grey, overlay

# Rows, columns and slices of a picture as radiologists look at it.
_VIEWS: dict[Plane, str] = {"axial": "PLS", "coronal": "ILA", "sagittal": "IPR"}


def save_picture(
    path: Path, title: str, image: Array, labels: Array, grid: Grid, names: Sequence[str], plane: Plane
) -> None:
    """Save the slice with most foreground, or the middle one, of (X, Y, Z) without and with the labels in colour."""
    orientations = package("nibabel.orientations")
    view = orientations.axcodes2ornt(_VIEWS[plane])
    turn = orientations.ornt_transform(orientations.io_orientation(grid.affine), view)
    image, labels = (orientations.apply_orientation(values, turn) for values in (image, labels))
    rows, columns, _ = (size for _, size in sorted(zip(turn[:, 0], grid.spacing, strict=True)))  # by their new axis
    foreground = (labels > 0).sum(axis=(0, 1))
    place = int(foreground.argmax()) if foreground.any() else labels.shape[2] // 2
    image, labels = image[..., place], labels[..., place]
    low, high = np.nanpercentile(image, (1, 99))
    shown = torch.from_numpy(np.nan_to_num(image, nan=low).clip(low, high))[None]
    figure = package("matplotlib.figure").Figure(figsize=(8, 4.4), layout="constrained")
    package("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, picture in zip(panels, (grey(shown), overlay(shown, torch.from_numpy(labels.copy()))), strict=True):
        axes.imshow(picture, aspect=rows / columns)
        axes.set_axis_off()
    for value in np.unique(labels[labels > 0]):
        panels[1].plot([], [], "s", color=COLOURS[(value - 1) % len(COLOURS)] / 255, label=names[value])
    if (labels > 0).any():
        for text in figure.legend(loc="outside lower center", ncols=5, frameon=False).get_texts():
            text.set_parse_math(False)
    # A dollar in a name is no formula.
    figure.suptitle(f"{title}, {plane} slice {place + 1} of {len(foreground)}", fontsize=10, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name that the font cannot write
        figure.savefig(path, dpi=100)

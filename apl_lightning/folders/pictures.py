"""A picture of the labels of a case."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apl_lightning.nifti import Array, Grid, Plane, package

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
    figure = package("matplotlib.figure").Figure(figsize=(8, 4.4), layout="constrained")
    package("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    for axes in (panels := figure.subplots(1, 2)):
        axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=rows / columns)
        axes.set_axis_off()
    colours = package("matplotlib").colormaps["tab10"].colors
    for value in np.unique(labels[labels > 0]):
        colour = colours[(value - 1) % len(colours)]
        layer = np.zeros((*labels.shape, 4))
        layer[labels == value] = (*colour, 0.5)
        panels[1].imshow(layer, aspect=rows / columns)
        panels[1].plot([], [], "s", color=colour, label=names[value])
    if (labels > 0).any():
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{title}, {plane} slice {place + 1} of {len(foreground)}", fontsize=10)
    figure.savefig(path, dpi=100)

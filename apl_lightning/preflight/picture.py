"""The picture of a preflight report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from apl_lightning._support.files import new_file
from apl_lightning._support.packages import package
from apl_lightning.visualize import overlay


class Shown(NamedTuple):
    """An image (C, *S) under a view, and the label map (*S) that the network predicts for it."""

    image: Tensor
    labels: Tensor


def draw(rows: Mapping[str, Sequence[Shown]], path: Path) -> Path:
    """Write rows of images with their predictions; the key of a row is its title."""
    figures = package("matplotlib.figure", "examples", "a picture needs matplotlib")
    path = new_file(path)
    columns = max(map(len, rows.values()))
    figure = figures.Figure(figsize=(3 * columns, 3.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, shown) in zip(axes, rows.items(), strict=True):
        line[0].set_title(title, loc="left")
        for axis, one in zip(line, shown, strict=True):
            _show(axis, one.image, one.labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _show(axis: Any, image: Tensor, labels: Tensor) -> None:
    axis.axis("off")
    axis.imshow(overlay(image, labels), interpolation="nearest")

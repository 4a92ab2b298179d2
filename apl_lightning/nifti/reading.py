"""Images and label maps as arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apl_lightning.nifti.grid import Array, Grid, read_grid
from apl_lightning.nifti.packages import package


def read_image(files: Sequence[Path]) -> Array:
    """The image (C, X, Y, Z) in float32 in files that hold its channels, one or several each.

    Raises:
        ValueError: If it has NaN or infinity.
    """
    arrays = [np.asarray(package("nibabel").load(path).dataobj, dtype=np.float32) for path in files]
    image = np.concatenate([array.reshape(*array.shape[:3], -1) for array in arrays], axis=-1)
    if not np.isfinite(image).all():
        raise ValueError(
            f"Expected finite values, but {files[0]} has NaN or infinity: replace them, as `numpy.nan_to_num` does."
        )
    return np.ascontiguousarray(np.moveaxis(image, -1, 0))


def read_labels(path: Path) -> tuple[Array, Grid]:
    """A label map (X, Y, Z) in int64 and its grid.

    Raises:
        ValueError: If it has channels, or values that are no labels.
    """
    grid = read_grid(path)
    values: Any = np.asanyarray(package("nibabel").load(path).dataobj)
    values = values.reshape(values.shape[:3]) if values.shape[3:] == (1,) else values
    if values.ndim != 3:
        raise ValueError(f"Expected one label map (X, Y, Z), but {path} has shape {values.shape}.")
    labels = values.astype(np.int64)
    if not np.array_equal(labels, values) or labels.min() < 0:
        raise ValueError(f"Expected labels 0, 1, ..., but {path} has other values: save class indices.")
    return labels, grid

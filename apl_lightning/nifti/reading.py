"""Images and label maps as arrays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apl_lightning.nifti.grid import Array, Grid, read_grid, readable
from apl_lightning.nifti.packages import package


def read_image(files: Sequence[Path]) -> Array:
    """The image (C, X, Y, Z) in float32 in files that hold its channels, one or several each.

    Raises:
        ValueError: If it has NaN or infinity, or a file is damaged.
    """
    arrays = [_values(path, np.float32) for path in files]
    for path, array in zip(files, arrays, strict=True):
        if not np.isfinite(array).all():
            raise ValueError(
                f"Expected finite values, but {path} has NaN or infinity: replace them, as `numpy.nan_to_num` does."
            )
    image = np.concatenate([array.reshape(*array.shape[:3], -1) for array in arrays], axis=-1)
    return np.ascontiguousarray(np.moveaxis(image, -1, 0))


def read_labels(path: Path) -> tuple[Array, Grid]:
    """A label map (X, Y, Z) in int64 and its grid.

    Raises:
        ValueError: If it has channels, or values that are no labels.
    """
    grid = read_grid(path)
    values = _values(path)
    values = values.reshape(values.shape[:3]) if values.shape[3:] == (1,) else values
    if values.ndim != 3:
        raise ValueError(
            f"Expected one label map (X, Y, Z), but {path} has shape {values.shape}: save class indices of one volume."
        )
    labels = np.rint(values).astype(np.int64)
    # A scale factor in the header, which some tools leave there, gives values beside the integers.
    if not np.allclose(labels, values, rtol=0, atol=0.01) or labels.min() < 0:
        raise ValueError(f"Expected labels 0, 1, ..., but {path} has other values: save class indices.")
    return labels, grid


def _values(path: Path, dtype: type[np.float32] | None = None) -> Array:
    """The voxels of a file, scaled as its header says, in this type or the one that holds them."""
    nibabel = package("nibabel")
    with readable(path):
        values: Array = np.asarray(nibabel.load(path).dataobj, dtype)
    return values

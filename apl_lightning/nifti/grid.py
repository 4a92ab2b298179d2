"""Where the voxels of a file lie in the body."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apl_lightning.nifti.packages import package

Array = np.ndarray[Any, Any]

# Grids are the same if no corner differs by more than this share of a voxel: tools round affines differently.
_TOLERANCE = 0.1


class Grid(NamedTuple):
    """The spatial shape of a volume, and the affine (4, 4) from voxel indices to mm to the right, front and top."""

    shape: tuple[int, ...]
    affine: Array

    @property
    def spacing(self) -> tuple[float, ...]:
        """The size of a voxel along each axis, in mm."""
        return tuple(float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_volume(self) -> float:
        """The volume of a voxel in ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def axis(self, plane: str) -> int:
        """The axis that steps through the `"sagittal"`, `"coronal"` or `"axial"` slices, or is nearest to it."""
        codes = package("nibabel").aff2axcodes(self.affine)
        letters = {"sagittal": "LR", "coronal": "PA", "axial": "IS"}[plane]
        return next(axis for axis, code in enumerate(codes) if code in letters)

    def equals(self, other: "Grid") -> bool:
        """Whether both have the same voxels, up to a tenth of a voxel."""
        if tuple(self.shape) != tuple(other.shape):
            return False
        corners = np.array([[*corner, 1] for corner in itertools.product(*((0, size - 1) for size in self.shape))])
        distances = np.linalg.norm((corners @ (self.affine - other.affine).T)[:, :3], axis=1)
        return bool(distances.max() <= _TOLERANCE * min(self.spacing))

    def __str__(self) -> str:
        """Shape, spacing and axes, for messages."""
        spacing = " x ".join(f"{size:.3g}" for size in self.spacing)
        axes = "".join(code or "?" for code in package("nibabel").aff2axcodes(self.affine))
        origin = ", ".join(f"{value:.4g}" for value in self.affine[:3, 3])
        return f"{tuple(int(size) for size in self.shape)} of {spacing} mm, axes {axes}, origin ({origin})"


def read_grid(path: Path) -> Grid:
    """The grid of a NIfTI file, from its header.

    Raises:
        ValueError: If it is no volume, is not in mm, or has no valid affine.
    """
    nibabel = package("nibabel")
    with readable(path):
        image = nibabel.load(path)
    if len(image.shape) not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"Expected a volume (X, Y, Z) or, with channels, (X, Y, Z, C), but {path} has shape {image.shape}: save a "
            "single slice with a third axis of size 1."
        )
    if image.get_data_dtype().names:
        raise ValueError(f"Expected numbers, but {path} has colours: convert it to grey values.")
    try:
        unit = image.header.get_xyzt_units()[0]
    except KeyError:  # a code that the format does not define
        unit = "unknown"
    if unit not in ("mm", "unknown"):
        raise ValueError(f"Expected an affine in mm, but {path} is in units of {unit}: convert it.")
    grid = Grid(tuple(image.shape[:3]), np.asarray(image.affine, dtype=np.float64))
    if not np.isfinite(grid.affine).all() or not grid.voxel_volume > 0:
        raise ValueError(f"Expected an affine that can be inverted, but {path} has {grid.affine.tolist()}: repair it.")
    return grid


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise a `ValueError` that names the file if reading it fails."""
    try:
        yield
    except Exception as error:  # nibabel, gzip and the operating system raise their own
        raise ValueError(f"Expected a whole NIfTI file, but {path} cannot be read ({error}): copy it again.") from error

"""Volumes and affines of known geometry, written as NIfTI files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

Array = np.ndarray[Any, Any]


def affine(axes: str = "RAS", spacing: tuple[float, ...] = (1.0, 1.0, 1.0), degrees: float = 0.0) -> Array:
    """Axes in these directions, turned by `degrees` around an oblique axis, with an origin beside zero."""
    matrix = np.zeros((3, 3))
    for column, letter in enumerate(axes):
        row = next(row for row, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        matrix[row, column] = 1.0 if letter in "RAS" else -1.0
    k = np.array([1.0, 2.0, 2.0]) / 3
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    angle = np.deg2rad(degrees)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues
    result = np.eye(4)
    result[:3, :3] = rotation @ matrix * np.array(spacing)
    result[:3, 3] = (-31.5, 12.25, 700.0)
    return result


AFFINES = {
    "RAS": affine(),
    "LPS": affine("LPS", (0.8, 0.8, 2.5)),
    "sagittal": affine("PIR", (1.0, 1.2, 3.0)),
    "oblique": affine("LPS", (0.9, 1.1, 2.0), degrees=17),
}


def world(shape: tuple[int, ...], matrix: Array) -> Array:
    """The position of each voxel in mm, (*S, 3)."""
    indices = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return indices @ matrix[:3, :3].T + matrix[:3, 3]


def blobs(shape: tuple[int, ...], matrix: Array) -> Array:
    """Two ellipsoids in the body, classes 1 and 2, that no axis of the volume treats alike."""
    position = world(shape, matrix)
    centre, extent = position.mean(axis=(0, 1, 2)), np.ptp(position, axis=(0, 1, 2))
    labels = np.zeros(shape, dtype=np.uint8)
    for value, shift, radius in ((1, (-0.15, 0.05, -0.08), (0.26, 0.3, 0.3)), (2, (0.22, -0.2, 0.2), (0.22,) * 3)):
        scaled = (position - centre - np.array(shift) * extent) / (np.array(radius) * extent)
        labels[(scaled**2).sum(axis=-1) < 1] = value
    return labels


def write(path: Path, values: Array, matrix: Array, codes: tuple[int, int] = (1, 1)) -> Path:
    """Save a file with these codes of qform and sform, in mm, with a description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, matrix)
    image.set_qform(matrix, code=codes[0])
    image.set_sform(matrix, code=codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"phantom"
    image.header["cal_max"] = 400
    nibabel.save(image, path)
    return path


def dice(first: Array, second: Array, value: int) -> float:
    a, b = first == value, second == value
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))

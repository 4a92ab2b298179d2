"""Label maps back on the grid of a file, with its header."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apl_lightning._support.files import new_file, replacing
from apl_lightning.nifti.grid import Array, Grid
from apl_lightning.nifti.packages import package


def labels_on_grid(values: Array, grid: Grid, target: Grid) -> Array:
    """A label map (*S) of one grid on another one.

    If the grids differ by the order and the direction of their axes alone, no voxel changes. Otherwise each class is
    interpolated linearly, and a voxel gets the class with the largest share.
    """
    orientations = package("nibabel.orientations")
    turn = orientations.ornt_transform(
        orientations.io_orientation(grid.affine), orientations.io_orientation(target.affine)
    )
    turned = orientations.apply_orientation(values, turn)
    affine = grid.affine @ orientations.inv_ornt_aff(turn, values.shape)
    if Grid(turned.shape, affine).equals(target):
        return np.ascontiguousarray(turned)
    return _resampled(torch.from_numpy(values), grid, target)


def save_labels(labels: Array, like: Path, path: Path) -> None:
    """Write a label map (X, Y, Z) with the header of an image: its affine, codes, voxel sizes, units and description.

    The type is uint8, or int16 for labels above 255. The display range and the intent of the image are dropped.

    Raises:
        FileExistsError: If `path` exists.
        ValueError: If the shape is not that of the image, or a label is out of range or no whole number.
    """
    path = new_file(path)
    nibabel = package("nibabel")
    original = nibabel.load(like)
    if labels.shape != original.shape[:3]:
        raise ValueError(f"Expected labels of shape {original.shape[:3]}, like {like}, but got {labels.shape}.")
    if labels.size and not 0 <= labels.min() <= labels.max() < 2**15:
        raise ValueError(f"Expected labels between 0 and 32767, but got {labels.min()} to {labels.max()}.")
    if not np.array_equal(labels, np.floor(labels)):
        raise ValueError("Expected labels that are whole numbers, but got fractions: save classes, not probabilities.")
    dtype = np.uint8 if labels.max() < 256 else np.int16
    header = original.header.copy()
    header.set_data_dtype(dtype)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    image = type(original)(labels.astype(dtype), original.affine, header)
    with replacing(path) as unfinished:
        nibabel.save(image, unfinished)


def _resampled(labels: Tensor, grid: Grid, target: Grid) -> Array:
    transforms, data = package("monai.transforms"), package("monai.data")
    resample = transforms.SpatialResample(mode="bilinear", padding_mode="border", align_corners=True, dtype=torch.float)
    result = torch.zeros(target.shape, dtype=labels.dtype)
    largest = torch.full(target.shape, -1.0)
    for value in labels.unique():
        mask = data.MetaTensor((labels == value).float()[None], affine=torch.from_numpy(grid.affine))
        share = resample(mask, dst_affine=torch.from_numpy(target.affine), spatial_size=target.shape).as_tensor()[0]
        result[share > largest] = value
        largest = torch.maximum(share, largest)
    return result.numpy()

"""Every voxel stays where it is in the body, on the way in and on the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from phantoms import AFFINES, affine, blobs, dice, world, write

from apl_lightning.data import NiftiFolder
from apl_lightning.nifti.grid import Grid
from apl_lightning.nifti.writing import labels_on_grid

SHAPE = (28, 31, 17)
LARGE = (52, 56, 44)
EXACT: list[dict[str, Any]] = [
    {},
    {"orientation": None},
    {"orientation": "PLS", "plane": "axial"},
    {"orientation": None, "plane": "sagittal"},
    {"plane": "coronal"},
    {"orientation": "SAL", "plane": "sagittal"},
]
RESAMPLED: list[dict[str, Any]] = [
    {"spacing": (0.9, 1.2, 1.4)},
    {"spacing": (0.7, 0.7, 0.0), "plane": "axial", "orientation": "PLS"},
    {"size": (72, 68), "plane": "coronal"},
    {"size": (56, 56, 56), "orientation": None},
    {"spacing": (1.0, 1.0, 1.0), "plane": "sagittal", "orientation": "ASR"},
]


@pytest.mark.parametrize("options", EXACT + RESAMPLED, ids=str)
@pytest.mark.parametrize("name", AFFINES)
def test_grid_says_where_voxels_lie(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """The image holds its own position in mm, so that each preprocessed voxel says where its value comes from."""
    matrix = AFFINES[name]
    write(tmp_path / "a.nii.gz", world(SHAPE, matrix).astype(np.float32), matrix)
    folder = NiftiFolder(tmp_path, **options)
    image, _, grid = folder.volume(0)
    expected = world(grid.shape, grid.affine)
    indices = (expected - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
    inside = ((indices > 0) & (indices < np.array(SHAPE) - 1)).all(axis=-1)
    assert inside.mean() > 0.6
    assert np.abs(image.movedim(0, -1).numpy() - expected)[inside].max() < 0.01  # mm


@pytest.mark.parametrize("options", EXACT + RESAMPLED, ids=str)
@pytest.mark.parametrize("name", AFFINES)
def test_labels_return_to_their_file(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    matrix = AFFINES[name]
    labels = blobs(SHAPE if options in EXACT else LARGE, matrix)
    image = write(tmp_path / "images" / "a.nii.gz", labels.astype(np.float32), matrix, codes=(1, 2))
    write(tmp_path / "labels" / "a.nii.gz", labels, matrix)
    folder = NiftiFolder(tmp_path / "images", tmp_path / "labels", **options)
    samples = [folder[index] for index in folder.samples_of(0)]
    folder.save_labels(0, [sample["label"].long() for sample in samples], tmp_path / "out.nii.gz")
    written, original = nibabel.load(tmp_path / "out.nii.gz"), nibabel.load(image)
    if options in EXACT:
        assert np.array_equal(np.asarray(written.dataobj), labels)
        assert all(torch.equal(sample["label"].float(), sample["image"][0]) for sample in samples)
    else:
        assert min(dice(np.asarray(written.dataobj), labels, value) for value in (1, 2)) >= 0.98
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(written.affine, original.affine)
    for key in (
        "qform_code",
        "sform_code",
        "xyzt_units",
        "descrip",
        "pixdim",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
    ):
        assert np.array_equal(written.header[key], original.header[key]), key
    assert written.header["cal_max"] == 0


def test_slices_are_those_of_the_body(tmp_path: Path) -> None:
    """Rows of axial slices in "PLS" go to the back, columns to the left, and slices go up."""
    matrix = affine("RAS")
    write(tmp_path / "a.nii.gz", world(SHAPE, matrix).astype(np.float32), matrix)
    for path_axes in ("RAS", "LPI", "SRA"):
        turned = nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii.gz")).as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(path_axes)
            )
        )
        (tmp_path / path_axes).mkdir()
        nibabel.save(turned, tmp_path / path_axes / "a.nii.gz")
        slices = NiftiFolder(tmp_path / path_axes, plane="axial", orientation="PLS")
        assert len(slices) == SHAPE[2]
        x, y, z = slices[3]["image"]
        assert bool((y.diff(dim=0) < 0).all() and (x.diff(dim=1) < 0).all())
        assert float(z.min()) == float(z.max()) == 703.0


def test_labels_above_255_and_4d_images(tmp_path: Path) -> None:
    matrix = AFFINES["oblique"]
    write(tmp_path / "in" / "a.nii", np.random.default_rng(0).random((5, 6, 4, 2)).astype(np.float32), matrix)
    folder = NiftiFolder(tmp_path / "in")
    assert folder[0]["image"].shape == (2, 5, 6, 4)
    labels = torch.zeros(5, 6, 4, dtype=torch.long)
    labels[1, 2, 3] = 300
    folder.save_labels(0, [labels], tmp_path / "out.nii")
    written = nibabel.load(tmp_path / "out.nii")
    assert written.shape == (5, 6, 4)
    assert written.get_data_dtype() == np.int16
    assert np.asarray(written.dataobj).sum() == 300
    with pytest.raises(FileExistsError, match="Expected a new file, but"):
        folder.save_labels(0, [labels], tmp_path / "out.nii")


def test_label_maps_are_on_the_grid_of_samples(tmp_path: Path) -> None:
    """Tensors and arrays alike; they are classes."""
    write(tmp_path / "in" / "a.nii", np.zeros((4, 4, 4), dtype=np.float32), AFFINES["LPS"])
    folder, labels = NiftiFolder(tmp_path / "in"), torch.zeros(4, 4, 4)
    labels[0, 1, 0] = 2
    folder.save_labels(0, [labels], tmp_path / "tensor.nii")
    folder.save_labels(0, [labels.numpy()], tmp_path / "array.nii")
    for name in ("tensor", "array"):
        assert np.argwhere(np.asarray(nibabel.load(tmp_path / f"{name}.nii").dataobj)).tolist() == [[3, 2, 0]]
    with pytest.raises(TypeError, match="a list of label maps, one per sample, but got one ndarray"):
        folder.save_labels(0, labels.numpy(), tmp_path / "out.nii")
    with pytest.raises(ValueError, match="but got fractions: save classes, not probabilities"):
        folder.save_labels(0, [0.3 * labels], tmp_path / "out.nii")


def test_label_256(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.nii", np.zeros((2, 2, 2), dtype=np.float32), AFFINES["RAS"])
    folder = NiftiFolder(tmp_path / "in")
    for value in (255, 256):
        folder.save_labels(0, [torch.full((2, 2, 2), value)], tmp_path / f"{value}.nii")
        assert np.asarray(nibabel.load(tmp_path / f"{value}.nii").dataobj).max() == value


def test_tolerance_of_grids() -> None:
    def grid(shift: float) -> Grid:
        matrix = np.diag([1.0, 1.0, 5.0, 1.0])
        matrix[0, 3] = shift
        return Grid((4, 5, 6), matrix)

    assert grid(0.0).equals(grid(0.09))
    assert not grid(0.0).equals(grid(0.11)), "a tenth of the smallest side of a voxel"


def test_labels_on_a_finer_grid_that_is_larger() -> None:
    """Voxels of 2 mm with labels 1, 1, 2, 2 at 0, 2, 4 and 6 mm; beyond the border the nearest one continues."""
    coarse = Grid((2, 2, 4), np.diag([2.0, 2.0, 2.0, 1.0]))
    fine = np.diag([1.0, 1.0, 1.0, 1.0])
    fine[2, 3] = -1.0
    values = np.broadcast_to(np.array([1, 1, 2, 2]), (2, 2, 4)).copy()
    found = labels_on_grid(values, coarse, Grid((3, 3, 14), fine))
    assert (found[..., :4] == 1).all()  # -1 to 2 mm
    assert (found[..., 5:] == 2).all()  # 4 to 12 mm


def test_intent(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), dtype=np.float32), AFFINES["RAS"])
    image.header.set_intent("estimate", (), "an estimate")
    (tmp_path / "in").mkdir()
    nibabel.save(image, tmp_path / "in" / "a.nii")
    NiftiFolder(tmp_path / "in").save_labels(0, [torch.ones(2, 2, 2)], tmp_path / "out.nii")
    assert nibabel.load(tmp_path / "out.nii").header.get_intent()[0] == "none"

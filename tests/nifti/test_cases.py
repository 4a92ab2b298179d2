"""Which files make a case, and what is said where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from phantoms import AFFINES, affine, write

from apl_lightning.data import NiftiFolder
from apl_lightning.nifti import find_cases, read_grid, read_labels

SMALL = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("files", "channels", "cases"),
    [
        (["b.nii.gz", "a.nii", "notes.txt", ".hidden.nii"], None, {"a": 1, "b": 1}),
        (["a_0000.nii.gz", "b_0000.nii.gz"], None, {"a": 1, "b": 1}),  # nnU-Net with one channel
        (["a_0000.nii", "a_0001.nii", "b_0000.nii", "b_0001.nii"], None, {"a": 2, "b": 2}),
        (["p_0001.nii", "p_0002.nii"], None, {"p_0001": 1, "p_0002": 1}),  # numbers of patients
        (["p_0000.nii", "p_0001.nii"], 2, {"p": 2}),
        (["p_0000.nii", "p_0001.nii"], 1, {"p_0000": 1, "p_0001": 1}),
    ],
)
def test_files_make_cases(tmp_path: Path, files: list[str], channels: int | None, cases: dict[str, int]) -> None:
    found = find_cases(touch(tmp_path / "images", *files), channels=channels)
    assert {case.name: len(case.images) for case in found} == cases


@pytest.mark.parametrize(
    ("files", "channels", "message"),
    [
        (["scan.dcm"], None, r"none \(scan.dcm\): convert DICOM"),
        (["a.nii", "a.nii.gz"], None, "Expected one file of 'a'"),
        (["p_0000.nii", "p_0001.nii"], None, "pass channels=2, or channels=1"),
        (["a_0000.nii", "a_0001.nii", "b_0000.nii"], None, "Expected 2 files of case 'b'"),
        (["a_0000.nii", "a_0001.nii", "b_0001.nii"], None, "got a_0000 and no b_0000: add what is missing, or pass"),
        (["a.nii"], 2, "Expected 2 files per case"),
    ],
)
def test_unclear_folders(tmp_path: Path, files: list[str], channels: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NiftiFolder(touch(tmp_path / "images", *files), channels=channels)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is no folder: check the path"):
        NiftiFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is empty"):
        NiftiFolder(tmp_path)


def test_channels_of_several_files(tmp_path: Path) -> None:
    for case, channel in ((case, channel) for case in "ab" for channel in (0, 1)):
        write(tmp_path / f"{case}_{channel:04d}.nii.gz", SMALL + 100 * channel, AFFINES["RAS"])
    folder = NiftiFolder(tmp_path)
    assert torch.equal(folder[1]["image"], torch.from_numpy(np.stack([SMALL, SMALL + 100])))
    write(tmp_path / "b_0001.nii.gz", SMALL, affine("RAS", (1, 1, 2)))
    with pytest.raises(ValueError, match="all files of case 'b' on one grid"):
        NiftiFolder(tmp_path)


def test_labels_of_another_shape_or_missing(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.nii.gz", SMALL, AFFINES["RAS"])
    write(tmp_path / "labels" / "b.nii.gz", SMALL, AFFINES["RAS"])
    with pytest.raises(ValueError, match=r"but a has none among b.nii.gz"):
        NiftiFolder(tmp_path / "images", tmp_path / "labels")
    write(tmp_path / "labels" / "a.nii.gz", SMALL[1:], AFFINES["RAS"])
    with pytest.raises(ValueError, match=r"a.nii.gz has \(1, 3, 4\) of 1 x 1 x 1 mm"):
        NiftiFolder(tmp_path / "images", tmp_path / "labels")
    write(tmp_path / "labels" / "a.nii.gz", SMALL + 0.5, AFFINES["RAS"])
    with pytest.raises(ValueError, match="Expected labels 0, 1"):
        NiftiFolder(tmp_path / "images", tmp_path / "labels")


@pytest.mark.parametrize("plane", [None, "sagittal", "axial"])
def test_samples_are_copies(tmp_path: Path, plane: Any) -> None:
    write(tmp_path / "a.nii.gz", SMALL, AFFINES["RAS"])
    folder = NiftiFolder(tmp_path, plane=plane)
    before = folder[0]["image"].clone()
    folder[0]["image"].add_(1)
    assert torch.equal(folder[0]["image"], before)


def test_the_channel_with_nan_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a_0000.nii.gz", SMALL, AFFINES["RAS"])
    write(tmp_path / "a_0001.nii.gz", SMALL * np.nan, AFFINES["RAS"])
    with pytest.raises(ValueError, match=r"a_0001.nii.gz has NaN"):
        NiftiFolder(tmp_path, channels=2)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orientation": "RAX"}, "Expected `orientation`"),
        ({"orientation": "RLS"}, "Expected `orientation`"),
        ({"plane": "transversal"}, "Expected `plane`"),
        ({"size": (4, 4)}, "3 numbers of at least 1"),
        ({"size": (4, 4, 4), "plane": "axial"}, "2 numbers of at least 1"),
        ({"size": (4, 4, 4), "spacing": (1, 1, 1)}, "`spacing` or `size`, but got both"),
        ({"spacing": (-1, 1, 1)}, "`spacing` of the three axes in mm, 0 to keep"),
        ({"spacing": (1, float("nan"), 1)}, "`spacing` of the three axes in mm, 0 to keep"),
        ({"window": (0, 1), "percentiles": (1, 99)}, "`window` or `percentiles`, but got both"),
        ({"window": (1, 0)}, "a lower and an upper limit"),
        ({"percentiles": (1, 101)}, "between 0 and 100"),
        ({"preprocess": lambda image: image[..., 1:]}, "to keep the size"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.nii.gz", SMALL, AFFINES["RAS"])
    with pytest.raises(ValueError, match=message):
        NiftiFolder(tmp_path, **options)[0]


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"not a volume")
    with pytest.raises(ValueError, match=r"a.nii.gz cannot be read"):
        NiftiFolder(tmp_path)
    write(tmp_path / "a.nii.gz", np.full((2, 2, 2), np.nan, dtype=np.float32), AFFINES["RAS"])
    with pytest.raises(ValueError, match="has NaN or infinity"):
        NiftiFolder(tmp_path)
    write(tmp_path / "a.nii.gz", np.zeros((2, 2), dtype=np.float32), AFFINES["RAS"])
    with pytest.raises(ValueError, match=r"has shape \(2, 2\): save a single slice with a third axis"):
        NiftiFolder(tmp_path)


def test_intensities(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(100, 50, (6, 7, 8)).astype(np.float32)
    write(tmp_path / "a.nii.gz", values, AFFINES["RAS"])

    def read(**options: Any) -> Any:
        image: torch.Tensor = NiftiFolder(tmp_path, **options)[0]["image"]
        return image[0].numpy()

    assert np.array_equal(read(), values)
    np.testing.assert_allclose(read(window=(50, 150)), ((values - 50) / 100).clip(0, 1), atol=1e-5)
    low, high = np.percentile(values, (5, 90))
    scaled = ((values - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(read(percentiles=(5, 90)), scaled, atol=1e-4)
    np.testing.assert_allclose(
        read(percentiles=(5, 90), normalize=True), (scaled - scaled.mean()) / scaled.std(), atol=1e-3
    )
    np.testing.assert_allclose(read(preprocess=lambda image: 2 * image), 2 * values)


@pytest.mark.parametrize("plane", [None, "axial"])
def test_without_cache_samples_are_the_same(tmp_path: Path, plane: Any) -> None:
    for case, name in enumerate(AFFINES):
        values = np.random.default_rng(case).random((4 + case, 5, 3 + case)).astype(np.float32)
        write(tmp_path / f"{name}.nii.gz", values, AFFINES[name])
    cached, fresh = (NiftiFolder(tmp_path, plane=plane, cache=cache) for cache in (True, False))
    assert len(cached) == len(fresh)
    for index in range(len(cached)):
        assert cached[index]["case"] == fresh[index]["case"]
        assert torch.equal(cached[index]["image"], fresh[index]["image"])
    assert len(fresh._volumes) == 1


def test_a_link_without_its_file(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", SMALL, AFFINES["RAS"])
    (tmp_path / "b.nii.gz").symlink_to(tmp_path / "missing.nii.gz")
    with pytest.raises(ValueError, match=r"b.nii.gz is a link to none: get its content first"):
        find_cases(tmp_path)


def test_labels_with_a_scale_factor(tmp_path: Path) -> None:
    """nibabel scales floats when it saves them as integers; 3 is read as 3.0004."""
    labels = np.array([0, 1, 2, 3, 70, 1], dtype=np.float64).reshape(1, 2, 3)
    image = nibabel.Nifti1Image(labels, AFFINES["RAS"])
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert not np.array_equal(nibabel.load(tmp_path / "a.nii.gz").get_fdata(), labels)
    assert np.array_equal(read_labels(tmp_path / "a.nii.gz")[0], labels)


@pytest.mark.parametrize("plane", [None, "axial", "sagittal"])
def test_preprocess_sees_a_whole_case(tmp_path: Path, plane: Any) -> None:
    """As SIFA needs it: the mean is that of all slices."""
    values = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
    write(tmp_path / "a.nii.gz", values, AFFINES["RAS"])

    def centred(image: torch.Tensor) -> torch.Tensor:
        assert image.shape[-2:] == {None: (5, 3), "axial": (4, 5), "sagittal": (5, 3)}[plane]
        return (image - image.mean()).expand(*(3 if size == 1 else -1 for size in image.shape))

    folder = NiftiFolder(tmp_path, plane=plane).with_preprocess(centred)
    expected = torch.from_numpy(values - values.mean())
    axis = {None: None, "axial": 2, "sagittal": 0}[plane]
    for index, sample in enumerate(folder):
        wanted = expected if axis is None else expected.select(axis, index)
        torch.testing.assert_close(sample["image"], wanted.expand(3, *wanted.shape), atol=1e-6, rtol=0)


def test_sub_folders(tmp_path: Path) -> None:
    write(tmp_path / "sub-01" / "a.nii.gz", np.zeros((2, 2, 2), np.float32), AFFINES["RAS"])
    with pytest.raises(ValueError, match="sub-folders such as 'sub-01' are not read, so pass one of them"):
        NiftiFolder(tmp_path)


def test_colours(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(values, AFFINES["RAS"]), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="has colours: convert it to grey values"):
        NiftiFolder(tmp_path)[0]


def test_files_in_sub_folders_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.nii.gz")
    touch(tmp_path / "images" / "site_b", "b.nii.gz")
    with pytest.warns(UserWarning, match="has files in sub-folders such as 'site_b' too, which are not read"):
        assert [case.name for case in find_cases(tmp_path / "images")] == ["a"]


def test_unknown_code_of_units(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", SMALL, np.eye(4))
    image = nibabel.load(path)
    image.header["xyzt_units"] = 4
    nibabel.save(nibabel.Nifti1Image(SMALL, image.affine, image.header), path)
    assert read_grid(path).shape == SMALL.shape

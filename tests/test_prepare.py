"""The prepare command on synthetic downloads with a known anatomy."""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

EXAMPLES = Path(__file__).parent.parent / "examples"
GREYS = {0: 0, 1: 63, 2: 126, 3: 189, 4: 252}  # CHAOS
CLASSES = {0: 0, 1: 6, 2: 2, 3: 3, 4: 1}  # BTCV


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("prepare_abdomen")


def anatomy(shape: tuple[int, int, int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Image and label with an organ in each corner; slices start at the feet, rows in front, columns at the right."""
    label = np.zeros(shape, np.uint8)
    slices, rows, columns = shape
    label[slices // 2 : slices - 6, : rows // 3, : columns // 3] = 1  # liver: front, right, top
    label[6 : slices // 2, rows // 2 :, : columns // 4] = 2
    label[6 : slices // 2, rows // 2 :, columns // 2 :] = 3
    label[slices // 2 : slices - 6, rows // 2 :, columns // 2 :] = 4
    label[slices // 2 : slices - 6, rows // 3 : rows // 2, columns // 2 :] = 0
    return label.astype(np.float32) * 100, label


def dicom(plane: np.ndarray[Any, Any], height: float, spacing: float) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = FileDataset("slice", {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = plane.shape
    file.PixelSpacing = [spacing, spacing]
    file.ImagePositionPatient = [0.0, 0.0, height]
    file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation, file.SamplesPerPixel = 15, 0, 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.PixelData = plane.astype(np.uint16).tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, enforce_file_format=True)
    return buffer.getvalue()


def write_chaos(path: Path, image: Any, label: Any) -> None:
    """Write the zip file of CHAOS; its first file is the top slice."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(len(image)):
            z = len(image) - 1 - number
            folder = "Train_Sets/MR/2/T2SPIR"
            archive.writestr(f"{folder}/DICOM_anon/IMG-0002-{number:05d}.dcm", dicom(image[z], 7.7 * z - 300, 2.5))
            grey = np.vectorize(GREYS.get)(label[z]).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(grey).save(buffer, "png")
            archive.writestr(f"{folder}/Ground/IMG-0002-{number:05d}.png", buffer.getvalue())
            archive.writestr(f"Train_Sets/MR/2/T1DUAL/DICOM_anon/InPhase/IMG-{number:05d}.dcm", b"another series")


def write_btcv(folder: Path, image: Any, label: Any) -> None:
    """Write the NIfTI files of BTCV, with the first axis from right to left as in the original files."""
    affine = np.diag([-1.6, 1.6, 3.0, 1.0])
    for name, values in (("img", image), ("label", np.vectorize(CLASSES.get)(label).astype(np.uint8))):
        (folder / name).mkdir(parents=True)
        stored = np.asarray(values)[:, ::-1].transpose(2, 1, 0)  # columns from the right, rows from the back
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(stored), affine), folder / name / f"{name}0002.nii.gz")


def test_prepared_folder(prepare: Any, tmp_path: Path) -> None:
    mr_image, mr_label = anatomy((20, 100, 100))
    ct_image, ct_label = anatomy((30, 128, 128))
    write_chaos(tmp_path / "chaos.zip", mr_image, mr_label)
    write_btcv(tmp_path / "btcv", ct_image - 125, ct_label)
    out = tmp_path / "out"
    prepare.main(["--chaos", str(tmp_path / "chaos.zip"), "--btcv", str(tmp_path / "btcv"), "--out", str(out)])

    meta = json.loads((out / "meta.json").read_text())
    assert meta["split"]["source_train"] == ["chaos_mr_02"]
    assert meta["split"]["target_adapt"] == ["btcv_ct_02"]
    mr, ct = (np.load(out / case["file"]) for case in meta["cases"])
    # 100 rows of 2.5 mm are resampled to 200 rows of 1.25 mm and padded by 28 rows on each side.
    assert mr["image"].dtype == np.int16
    np.testing.assert_array_equal(mr["label"][:, 28:228:2, 28:228:2], mr_label)
    assert not mr["label"][:, :28].any()
    assert mr["label"].shape == (20, 256, 256)
    # Organs are in slices 6 to 23, with a margin of five slices. The window maps 400 HU to 255.
    np.testing.assert_array_equal(ct["label"][:, ::2, ::2], ct_label[1:29])
    inside = ct["label"][:, ::2, ::2] == 4
    assert (ct["image"][:, ::2, ::2][inside] >= 250).mean() > 0.9
    assert ct["image"].dtype == np.uint8
    assert [case["spacing_zyx_mm"] for case in meta["cases"]] == [[7.7, 1.25, 1.25], pytest.approx([3.0, 0.8, 0.8])]


def test_prepared_folder_is_read_by_the_examples(prepare: Any, tmp_path: Path) -> None:
    image, label = anatomy((20, 64, 64))
    write_chaos(tmp_path / "chaos.zip", image, label)
    write_btcv(tmp_path / "btcv", image - 125, label)
    prepare.main(["--chaos", str(tmp_path / "chaos.zip"), "--btcv", str(tmp_path / "btcv"), "--out", str(tmp_path)])
    slices = importlib.import_module("slices").Slices(tmp_path, "target_adapt", size=32)
    assert slices[10]["image"].shape == (1, 32, 32)
    assert {int(value) for item in range(len(slices)) for value in slices[item]["label"].unique()} == {0, 1, 2, 3, 4}

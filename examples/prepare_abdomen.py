"""Convert the original downloads of CHAOS and BTCV to the folder that the examples read.

    python examples/prepare_abdomen.py --chaos CHAOS_Train_Sets.zip --btcv Abdomen/RawData/Training --out DIR

CHAOS (doi 10.5281/zenodo.3431873, CC BY-NC-SA 4.0) is a zip file with DICOM images and PNG labels; its T2-SPIR MR
series are used. BTCV (Synapse syn3193805, CC BY 4.0) is a folder with `img/img0001.nii.gz`, `label/label0001.nii.gz`
and so on. Requires `pip install pydicom nibabel`.

Each patient becomes one `npz` with `image` and `label` of shape (slices, rows, columns): row 0 is anterior, column 0
is the patient's right, and slices are ordered from feet to head. MR is clipped at its 99.5th percentile, resampled to
7.7 x 1.25 x 1.25 mm and cropped or padded to 256 x 256; CT is windowed from -125 to 275 HU, scaled to 0..255, resized
to 256 x 256 and trimmed to the organs and 5 slices on either side.
"""

import argparse
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[Any]
LABELS = {0: "background", 1: "liver", 2: "right kidney", 3: "left kidney", 4: "spleen"}
CHAOS_RANGES = {1: (55, 70), 2: (110, 135), 3: (175, 200), 4: (240, 255)}
BTCV_CLASSES = {6: 1, 2: 2, 3: 3, 1: 4}
SIZE = 256
MR_SPACING = (7.7, 1.25, 1.25)
CT_WINDOW = (-125.0, 275.0)
CT_MARGIN = 5

# By patient. The published test patients are the blind patients of the final evaluation.
SPLIT = {
    "source_train": ("chaos_mr", (2, 3, 5, 8, 10, 15, 19, 20, 21, 22, 31, 33, 34)),
    "source_val": ("chaos_mr", (36, 37, 39)),
    "source_test": ("chaos_mr", (1, 13, 32, 38)),
    "target_adapt": ("btcv_ct", (2, 3, 4, 6, 7, 8, 10, 21, 23, 24, 25, 26, 28, 29, 31, 34, 35, 37, 38, 40)),
    "target_val": ("btcv_ct", (5, 22, 27, 36)),
    "target_test": ("btcv_ct", (1, 9, 30, 32, 33, 39)),
}


class Volume(NamedTuple):
    """One patient: image and label (slices, rows, columns) and the voxel spacing in mm in the same order."""

    image: Array
    label: Array
    spacing: tuple[float, ...]


def read_chaos(archive: Path) -> Iterator[tuple[int, Volume]]:
    """Read the T2-SPIR series of each MR patient in the zip file; yields the patient number and the volume."""
    import pydicom

    with zipfile.ZipFile(archive) as files:
        series: dict[int, dict[str, list[str]]] = {}
        for name in files.namelist():
            if found := re.search(r"MR/(\d+)/T2SPIR/(DICOM_anon|Ground)/[^/]+\.(dcm|png)$", name):
                series.setdefault(int(found[1]), {}).setdefault(found[2], []).append(name)
        for patient, parts in sorted(series.items()):
            images, labels = sorted(parts["DICOM_anon"]), sorted(parts["Ground"])
            if len(images) != len(labels):
                raise ValueError(
                    f"Expected a label for each image of MR {patient}, but got {len(labels)} for {len(images)}."
                )
            slices = []
            for image, label in zip(images, labels, strict=True):
                dicom = pydicom.dcmread(io.BytesIO(files.read(image)))
                slices.append((dicom, np.array(Image.open(io.BytesIO(files.read(label))))))
            yield patient, _chaos_volume(slices)


def _chaos_volume(slices: list[tuple[Any, Array]]) -> Volume:
    slices = sorted(slices, key=lambda pair: float(pair[0].ImagePositionPatient[2]))  # z grows to the head
    heights = [float(dicom.ImagePositionPatient[2]) for dicom, _ in slices]
    image = np.stack([dicom.pixel_array for dicom, _ in slices]).astype(np.float32)
    grey = np.stack([label for _, label in slices])
    first = slices[0][0]
    label = np.zeros(grey.shape, np.uint8)
    for number, (low, high) in CHAOS_RANGES.items():
        label[(grey >= low) & (grey <= high)] = number
    # Columns run to the patient's left and rows to the back, as the x and y axes of DICOM.
    across, down = np.sign(first.ImageOrientationPatient[0]), np.sign(first.ImageOrientationPatient[4])
    step = float(np.median(np.diff(heights)))
    image, label = (values[:, :: int(down), :: int(across)] for values in (image, label))
    return Volume(image, label, (step, *(float(size) for size in first.PixelSpacing)))


def read_btcv(folder: Path) -> Iterator[tuple[int, Volume]]:
    """Read each CT patient of the folder; yields the patient number and the volume."""
    import nibabel

    for path in sorted((folder / "img").glob("img*.nii.gz")):
        patient = int(path.name.removeprefix("img").removesuffix(".nii.gz"))
        nifti = nibabel.as_closest_canonical(nibabel.load(path))
        other = nibabel.as_closest_canonical(nibabel.load(folder / "label" / path.name.replace("img", "label")))
        # From (right, front, head) to (head, back, left).
        image, raw = (np.asarray(volume.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1] for volume in (nifti, other))
        label = np.zeros(raw.shape, np.uint8)
        for theirs, ours in BTCV_CLASSES.items():
            label[raw == theirs] = ours
        yield patient, Volume(image.astype(np.float32), label, tuple(map(float, nifti.header.get_zooms()[2::-1])))


def prepare_mr(volume: Volume) -> Volume:
    """Clip, resample and crop or pad an MR volume."""
    image = np.minimum(volume.image, np.percentile(volume.image, 99.5))
    factors = [old / new for old, new in zip(volume.spacing, MR_SPACING, strict=True)]
    image, label = (
        _centred(ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True))
        for values, order in ((image, 1), (volume.label, 0))
    )
    return Volume(image.round().astype(np.int16), label, MR_SPACING)


def prepare_ct(volume: Volume) -> Volume:
    """Window, resize and trim a CT volume."""
    low, high = CT_WINDOW
    image = ((volume.image - low) / (high - low)).clip(0, 1) * 255
    factors = (1.0, SIZE / image.shape[1], SIZE / image.shape[2])
    image, label = (
        ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True)
        for values, order in ((image, 1), (volume.label, 0))
    )
    held = np.flatnonzero(label.any(axis=(1, 2)))
    some = slice(max(0, held[0] - CT_MARGIN), held[-1] + 1 + CT_MARGIN)
    spacing = tuple(size / factor for size, factor in zip(volume.spacing, factors, strict=True))
    return Volume(image[some].round().astype(np.uint8), label[some], spacing)


def _centred(values: Array) -> Array:
    """Crop rows and columns around the centre, or pad them with zeros."""
    for axis in (1, 2):
        missing = SIZE - values.shape[axis]
        if missing < 0:
            start = -missing // 2
            values = values.take(range(start, start + SIZE), axis=axis)
        else:
            widths = [(0, 0)] * 3
            widths[axis] = (missing // 2, missing - missing // 2)
            values = np.pad(values, widths)
    return values


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chaos", type=Path, required=True, help="CHAOS_Train_Sets.zip")
    parser.add_argument("--btcv", type=Path, required=True, help="folder with img/ and label/")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)

    cases = []
    for domain, name, patients, prepare in (
        ("mr", "chaos_mr", read_chaos(arguments.chaos), prepare_mr),
        ("ct", "btcv_ct", read_btcv(arguments.btcv), prepare_ct),
    ):
        (arguments.out / domain).mkdir(parents=True, exist_ok=True)
        for number, volume in patients:
            image, label, spacing = prepare(volume)
            case = f"{name}_{number:02d}"
            np.savez_compressed(arguments.out / domain / f"{case}.npz", image=image, label=label)
            file, shape = f"{domain}/{case}.npz", list(image.shape)
            cases.append({"id": case, "domain": domain, "file": file, "shape": shape, "spacing_zyx_mm": list(spacing)})
            print(f"{case}: {shape}", flush=True)
        if not any(case["domain"] == domain for case in cases):
            raise SystemExit(f"Expected {domain.upper()} volumes, but got none: check --chaos and --btcv.")
    there = {case["id"] for case in cases}
    named = {f"{name}_{number:02d}" for name, numbers in SPLIT.values() for number in numbers}
    if missing := sorted(named - there):
        print(f"Not there, so left out of the splits: {', '.join(missing)}")
    split = {
        part: [case for number in numbers if (case := f"{name}_{number:02d}") in there]
        for part, (name, numbers) in SPLIT.items()
    }
    meta = {"labels": {str(number): name for number, name in LABELS.items()}, "split": split, "cases": cases}
    (arguments.out / "meta.json").write_text(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()

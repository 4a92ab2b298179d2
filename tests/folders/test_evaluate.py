"""Scores against cases computed by hand, and what is said of scores that do not exist."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from phantoms import Array, affine, write
from scipy import ndimage

from apl_lightning.folders import evaluate_folder


def mask(*corners: tuple[slice, slice, slice], shape: tuple[int, int, int] = (20, 20, 10)) -> Array:
    labels = np.zeros(shape, dtype=np.uint8)
    for value, corner in enumerate(corners, start=1):
        labels[corner] = value
    return labels


@pytest.mark.parametrize(("axis", "distance"), [(0, 2.0), (1, 3.0), (2, 5.0)])
def test_planes_at_a_known_distance(tmp_path: Path, axis: int, distance: float) -> None:
    """Two planes, one voxel apart: each surface point is one voxel size from the other surface."""
    first, second = mask(), mask()
    np.moveaxis(first, axis, 0)[4] = 1
    np.moveaxis(second, axis, 0)[5] = 1
    matrix = affine("LPS", (2.0, 3.0, 5.0), degrees=20)
    write(tmp_path / "p" / "a.nii.gz", first, matrix)
    write(tmp_path / "r" / "a.nii.gz", second, matrix)
    (score, *_) = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert (score.case, score.name, score.dice) == ("a", "1", 0.0)
    assert score.hd95 == pytest.approx(distance, abs=1e-4)
    assert score.assd == pytest.approx(distance, abs=1e-4)


def test_lines_of_unequal_length(tmp_path: Path) -> None:
    """A line of 10 voxels and one of 8 in it, 2 mm each: two points are 2 and 4 mm away, all others 0."""
    write(tmp_path / "p" / "a.nii.gz", mask((slice(2, 12), slice(5, 6), slice(5, 6))), affine("RAS", (2, 1, 1)))
    write(tmp_path / "r" / "a.nii.gz", mask((slice(2, 10), slice(5, 6), slice(5, 6))), affine("RAS", (2, 1, 1)))
    (score, *_) = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert score.dice == pytest.approx(16 / 18)
    assert score.assd == pytest.approx((2 + 4) / 18)
    assert score.hd95 == pytest.approx(np.percentile([0] * 8 + [2, 4], 95))


def test_a_single_slice_is_a_plane(tmp_path: Path) -> None:
    """Only the rim of a disc is its surface, though in 3D every voxel of one slice lies at a border."""
    rows, columns = np.mgrid[:48, :48]
    discs = [((rows - 20) ** 2 + (columns - centre) ** 2 <= 144) for centre in (20, 24)]
    for folder, disc in zip("pr", discs, strict=True):
        write(tmp_path / folder / "a.nii.gz", disc[..., None].astype(np.uint8), affine("RAS", (2, 2, 7)))
    rims = [2 * np.argwhere(disc & ~ndimage.binary_erosion(disc)) for disc in discs]
    between = np.linalg.norm(rims[0][:, None] - rims[1][None], axis=-1)
    nearest = between.min(axis=1), between.min(axis=0)
    (score, *_) = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert score.hd95 == pytest.approx(max(np.percentile(one, 95) for one in nearest))
    assert score.assd == pytest.approx(np.concatenate(nearest).mean())


def test_scores_that_do_not_exist(tmp_path: Path) -> None:
    box, other = (slice(2, 8),) * 3, (slice(12, 15), slice(12, 15), slice(2, 8))
    both, one = mask(box, other), mask(box)
    two = both * (both == 2)
    files = {
        "equal": (both, both),
        "lost": (one, both),
        "invented": (both, two),
        "empty": (mask(), mask()),
        "moved": (both, both),
    }
    for name, (prediction, reference) in files.items():
        write(tmp_path / "p" / f"{name}.nii.gz", prediction, affine())
        write(tmp_path / "r" / f"{name}.nii.gz", reference, affine("RAS", (1, 1, 2)) if name == "moved" else affine())
    write(tmp_path / "p" / "only_p.nii.gz", both, affine())
    write(tmp_path / "r" / "only_r.nii.gz", both, affine())
    out = tmp_path / "scores.csv"
    with pytest.warns(UserWarning, match=r"3 of 7 cases have no scores. moved: different grids, \(20, 20, 10\) of"):
        table = evaluate_folder(tmp_path / "p", tmp_path / "r", class_names=["background", "liver", "spleen"], out=out)
    by_name = {(score.case, score.name): score for score in table}
    assert by_name["equal", "liver"][2:] == (1, 0, 0, "")
    assert (by_name["lost", "spleen"].dice, by_name["lost", "spleen"].note) == (0, "absent in prediction")
    assert math.isnan(by_name["lost", "spleen"].hd95)
    assert (by_name["invented", "liver"].dice, by_name["invented", "liver"].note) == (0, "absent in reference")
    assert by_name["empty", "liver"].note == "absent in both"
    assert by_name["only_p", "liver"].note == "no reference"
    assert by_name["only_r", "spleen"].note == "no prediction"
    for case in ("empty", "moved", "only_p", "only_r"):
        assert all(math.isnan(value) for value in by_name[case, "liver"][2:5])
    liver, spleen, mean = table[-3:]
    assert liver[:3] == ("mean", "liver", pytest.approx(2 / 3))
    assert liver.note == "Dice of 3, distances of 2 of 7 cases"
    assert spleen.dice == pytest.approx(2 / 3)
    assert mean[:5] == ("mean", "mean", pytest.approx(2 / 3), 0, 0)
    rows = list(csv.reader(out.read_text().splitlines()))
    assert rows[0] == ["case", "class", "dice", "hd95_mm", "assd_mm", "note"]
    assert [row[:2] for row in rows[1:]] == [[score.case, score.name] for score in table]
    with pytest.raises(FileExistsError, match="Expected a new file"):
        evaluate_folder(tmp_path / "p", tmp_path / "r", out=out)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.nii.gz", mask((slice(2, 8),) * 3) * 3, affine())
    write(tmp_path / "r" / "b.nii.gz", mask((slice(2, 8),) * 3), affine())
    with pytest.raises(ValueError, match="Expected files of the same names in both folders"):
        evaluate_folder(tmp_path / "p", tmp_path / "r")
    write(tmp_path / "r" / "a.nii.gz", mask((slice(2, 8),) * 3), affine())
    with pytest.raises(ValueError, match="Expected labels below 2"):
        evaluate_folder(tmp_path / "p", tmp_path / "r", class_names=["background", "liver"])
    with pytest.warns(UserWarning, match="no prediction"):
        evaluate_folder(tmp_path / "p", tmp_path / "r")


def test_ignored_voxels_do_not_count(tmp_path: Path) -> None:
    box = (slice(2, 8),) * 3
    reference = mask(box)
    reference[10:15] = 255
    prediction = mask(box)
    prediction[12:14, 2:8, 2:8] = 1  # all of it in the ignored part
    write(tmp_path / "p" / "a.nii.gz", prediction, affine())
    write(tmp_path / "r" / "a.nii.gz", reference, affine())
    names, out = ["background", "liver"], tmp_path / "new" / "scores.csv"
    (score, *_) = evaluate_folder(tmp_path / "p", tmp_path / "r", class_names=names, ignore_index=255, out=out)
    assert score == ("a", "liver", 1.0, 0.0, 0.0, "")
    assert out.exists()
    with pytest.raises(ValueError, match="but got 255 in case a: pass all names, or `ignore_index`"):
        evaluate_folder(tmp_path / "p", tmp_path / "r", class_names=names)


def test_a_damaged_file_does_not_stop_the_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for folder in ("p", "r"):
            write(tmp_path / folder / f"{name}.nii.gz", mask((slice(2, 8),) * 3), affine())
    damaged = tmp_path / "p" / "b.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="1 of 2 cases have no scores. b: Expected a whole NIfTI file, but"):
        table = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert [score.dice for score in table if score.case == "a"] == [1.0]


def test_mean_of_classes(tmp_path: Path) -> None:
    box, other = (slice(2, 8),) * 3, (slice(12, 15), slice(12, 15), slice(2, 8))
    one = np.zeros((20, 20, 10), dtype=np.uint8)
    one[box] = 1
    two = one.copy()
    two[other] = 2
    for name, p, r in (("a", one, two), ("b", one, one), ("c", one, one)):
        write(tmp_path / "p" / f"{name}.nii.gz", p, affine())
        write(tmp_path / "r" / f"{name}.nii.gz", r, affine())
    *_, mean = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert mean.dice == 0.5  # class 1 has 1, class 2 has 0; the four scores have a mean of 3/4


def test_nothing_can_be_compared(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.nii.gz", np.zeros((4, 4, 4), np.uint8), affine())
    write(tmp_path / "r" / "a.nii.gz", np.zeros((4, 4, 5), np.uint8), affine())
    with pytest.raises(ValueError, match=r"none of 1 cases has a pair \(a: different grids"):
        evaluate_folder(tmp_path / "p", tmp_path / "r")


def test_a_table_that_cannot_be_written_fails_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate_folder(tmp_path / "none", tmp_path / "none", out=tmp_path / "file" / "scores.csv")

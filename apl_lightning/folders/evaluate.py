"""Dice and surface distances of the label maps in a folder."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from apl_lightning._support.files import new_file
from apl_lightning.folders.output import write_csv
from apl_lightning.nifti import Array, nifti_files, package, read_labels


class Score(NamedTuple):
    """The scores of a class in a case, or their mean over the cases, with a note if some are missing.

    `dice` is in [0, 1], `hd95` (95 % Hausdorff distance) and `assd` (average symmetric surface distance) are in mm.
    """

    case: str
    name: str
    dice: float
    hd95: float
    assd: float
    note: str = ""


def evaluate_folder(
    predictions: str | Path,
    references: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    ignore_index: int | None = None,
    out: str | Path | None = None,
) -> list[Score]:
    r"""Compare the label maps of two folders by their file names, with MONAI's metrics.

    $$\mathrm{HD95} = \max\left(P_{95}\{d(p, \partial T)\}, P_{95}\{d(t, \partial P)\}\right) \qquad
    \mathrm{ASSD} = \frac{\sum_p d(p, \partial T) + \sum_t d(t, \partial P)}{|\partial P| + |\partial T|}$$

    A score that does not exist is NaN, and `note` says why: a class that is absent from prediction and reference has no
    scores; one that is absent from either has a Dice of 0 and no distance. Cases without a counterpart or on another
    grid have no scores; a warning names them. The mean of each class (`case` is `"mean"`), and of the classes (`name`
    is `"mean"` too), leaves out NaN, and `note` counts what is in it.

    Args:
        predictions: A folder of label maps.
        references: A folder of label maps with the same names.
        class_names: Names, background included; numbers by default. Labels above are an error.
        ignore_index: The reference label of voxels that do not count, such as 255.
        out: A new file for the table, as CSV.

    Returns:
        The scores of each case and foreground class, then the means.

    Raises:
        ValueError: If no case can be compared, two `class_names` are the same, or a label is above theirs.
        FileExistsError: If `out` exists.
    """
    if class_names is not None and len(set(class_names)) < len(class_names):
        raise ValueError(f"Expected different `class_names`, background included, but got {list(class_names)}.")
    if out is not None:
        out = new_file(out)
        out.parent.mkdir(parents=True, exist_ok=True)  # fails here, and not after the scores are computed
    found: dict[str, dict[int, Score]] = {}
    refused: dict[str, str] = {}
    predicted, true = nifti_files(predictions), nifti_files(references)
    if not predicted.keys() & true.keys():
        raise ValueError(
            f"Expected files of the same names in both folders, but {predictions} has {next(iter(predicted))} and "
            f"{references} has {next(iter(true))}: rename one of them."
        )
    for case in sorted(predicted.keys() | true.keys()):
        try:
            scores = _scores_of_case(case, predicted.get(case), true.get(case), ignore_index)
        except ValueError as error:
            refused[case] = str(error)
            continue
        if class_names is not None and (highest := max(scores, default=0)) >= len(class_names):
            raise ValueError(
                f"Expected labels below {len(class_names)}, as there are {len(class_names)} `class_names` with "
                f"background, but got {highest} in case {case}: pass all names, or `ignore_index`."
            )
        found[case] = scores
    if refused:
        listed = "; ".join(f"{case}: {reason}" for case, reason in list(refused.items())[:3])
        if not found:
            raise ValueError(
                f"Expected label maps on the same grids, but none of {len(refused)} cases has a pair ({listed}): "
                "resample the predictions to the grids of the references."
            )
        warnings.warn(f"{len(refused)} of {len(refused) + len(found)} cases have no scores. {listed}", stacklevel=2)
    table = _table(found, refused, class_names)
    if out is not None:
        write_csv(Path(out), ["case", "class", "dice", "hd95_mm", "assd_mm", "note"], table)
    return table


def surface_scores(prediction: Array, reference: Array, spacing: Sequence[float]) -> tuple[float, float, float]:
    """Dice, HD95 and ASSD (mm) of two masks (*S), of which neither is empty."""
    metrics = package("monai.metrics")
    # Of a single slice in 3D every pixel would lie on the surface.
    flat = tuple(axis for axis, extent in enumerate(prediction.shape) if extent == 1)[: max(0, prediction.ndim - 2)]
    squeezed = [mask.squeeze(flat).astype(np.float32) for mask in (prediction, reference)]
    masks = [torch.from_numpy(mask)[None, None] for mask in squeezed]
    options = {"include_background": True, "spacing": [mm for axis, mm in enumerate(spacing) if axis not in flat]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls a function of its own in an old way
        dice = metrics.compute_dice(*masks, include_background=True)
        hd95 = metrics.compute_hausdorff_distance(*masks, percentile=95, **options)
        assd = metrics.compute_average_surface_distance(*masks, symmetric=True, **options)
    return float(dice), float(hd95), float(assd)


def _scores_of_case(case: str, predicted: Path | None, true: Path | None, ignore_index: int | None) -> dict[int, Score]:
    """The scores of each class that occurs; a `ValueError` says why there are none."""
    if predicted is None or true is None:
        raise ValueError("no prediction" if predicted is None else "no reference")
    (prediction, grid), (reference, other) = read_labels(predicted), read_labels(true)
    if not grid.equals(other):
        raise ValueError(f"different grids, {grid} and {other}")
    if ignore_index is not None:
        ignored = reference == ignore_index
        prediction, reference = (np.where(ignored, 0, labels) for labels in (prediction, reference))
    scores = {}
    for value in sorted({*np.unique(prediction).tolist(), *np.unique(reference).tolist()} - {0}):
        masks = prediction == value, reference == value
        if all(mask.any() for mask in masks):
            scores[value] = Score(case, str(value), *surface_scores(*masks, other.spacing))
        else:
            note = "absent in prediction" if masks[1].any() else "absent in reference"
            scores[value] = Score(case, str(value), 0.0, math.nan, math.nan, note)
    return scores


def _table(
    found: dict[str, dict[int, Score]], refused: dict[str, str], class_names: Sequence[str] | None
) -> list[Score]:
    occurring = {value for scores in found.values() for value in scores}
    values = sorted(occurring) if class_names is None else range(1, len(class_names))
    names = {value: str(value) if class_names is None else class_names[value] for value in values}
    nothing = (math.nan, math.nan, math.nan)
    table = []
    for case in sorted(found.keys() | refused.keys()):
        for value, name in names.items():
            absent = Score(case, name, *nothing, refused.get(case, "absent in both"))
            table.append(found.get(case, {}).get(value, absent)._replace(name=name))
    means = [_mean([score for score in table if score.name == name], name, "cases") for name in names.values()]
    return [*table, *means, _mean(means, "mean", "classes")]


def _mean(scores: list[Score], name: str, unit: str) -> Score:
    columns = [[s.dice for s in scores], [s.hd95 for s in scores], [s.assd for s in scores]]
    finite = [[value for value in column if not math.isnan(value)] for column in columns]
    dice, hd95, assd = (sum(column) / len(column) if column else math.nan for column in finite)
    counts = len(finite[0]), len(finite[1])
    note = (
        "" if min(counts) == len(scores) else f"Dice of {counts[0]}, distances of {counts[1]} of {len(scores)} {unit}"
    )
    return Score("mean", name, dice, hd95, assd, note)

"""Scores of label maps, as a table."""

import sys
from collections.abc import Sequence
from pathlib import Path

from apl_lightning.folders import evaluate_folder


def evaluate(
    predictions: str | Path,
    references: str | Path,
    class_names: Sequence[str] | None = None,
    ignore_index: int | None = None,
    out: str | Path | None = None,
) -> None:
    """Compare the label maps of two folders by their file names: Dice, HD95 and ASSD of each class.

    Args:
        predictions: A folder of label maps.
        references: A folder of label maps with the same names.
        class_names: Names, background included; numbers by default.
        ignore_index: The reference label of voxels that do not count.
        out: A new file for the scores of each case, as CSV.
    """
    scores = evaluate_folder(predictions, references, class_names=class_names, ignore_index=ignore_index, out=out)
    lines = ["class             Dice   HD95 (mm)   ASSD (mm)"]
    lines += [
        f"{score.name:<15}{score.dice:>7.3f}{score.hd95:>12.2f}{score.assd:>12.2f}   {score.note}"
        for score in scores
        if score.case == "mean"
    ]
    sys.stdout.write("\n".join(lines) + "\n")

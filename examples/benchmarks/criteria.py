"""Evaluate label-free criteria for the choice of a round, and the guard, on the runs of the benchmark."""

import math
from collections import defaultdict
from statistics import mean
from typing import Any

from scipy import stats

from apl_lightning.guard import Guard

Row = dict[str, float]


def criteria(rows: list[Row]) -> dict[str, list[float]]:
    """The value of each criterion for each round of a run; higher means better."""
    found = {
        "information maximisation": [row["pseudo/im"] for row in rows],
        "soft neighbourhood density": [row["pseudo/snd"] for row in rows],
        "agreement of the heads": [row["pseudo/agreement"] for row in rows],
        "class-ratio drift (negative)": [-_drift(row, rows[0]) for row in rows],
        "the later, the better": list(range(len(rows))),
    }
    return found | {"the guard's": [number if healthy else -1 for number, healthy in enumerate(_healthy(rows))]}


def _healthy(rows: list[Row]) -> list[bool]:
    """For each round, whether the guard, which compares it with the first round, has no complaint and no doubt."""
    guard = Guard("restore")
    guard.start(rows[0] if rows else {})
    return [not (guard.complaints(row) or guard.doubts(row)) for row in rows]


def _drift(row: Row, first: Row) -> float:
    """The largest change of the share of a foreground class, as the absolute logarithm of the ratio."""
    names = [name for name in row if name.startswith("pseudo/class_ratio/") and not name.endswith("/background")]
    return max(abs(math.log(max(row[name], 1e-6) / max(first[name], 1e-6))) for name in names)


def criteria_table(runs: list[dict[str, Any]]) -> str:
    """Format a table: rank correlation of each criterion with the Dice, and gain of the round it selects."""
    correlations, gains = defaultdict(list), defaultdict(list)
    for run in runs:
        rows = run.get("rounds", [])
        dice = [row["val/dice"] for row in rows]
        for name, values in criteria(rows).items() if len(rows) > 2 else ():
            if len(set(values)) > 1 and len(set(dice)) > 1:
                correlations[name].append(float(stats.spearmanr(values, dice).statistic))
            chosen = max(range(len(rows)), key=lambda place: values[place])
            gains[name].append(dice[chosen] - dice[0])
    columns = ["criterion", "rank correlation with the Dice", "gain of the round it chooses", "worst gain"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, values in sorted(gains.items(), key=lambda item: mean(item[1])):
        cells = [
            f"{mean(correlations[name]):.2f}" if correlations[name] else "",
            f"{mean(values):.1f}",
            f"{min(values):.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def guarded(run: dict[str, Any]) -> float | None:
    """The average Dice of the round that `guard="restore"` returns to."""
    rows = run.get("rounds", [])
    dice = [row["val/dice"] for row, healthy in zip(rows, _healthy(rows), strict=True) if healthy]
    return dice[-1] if dice else None

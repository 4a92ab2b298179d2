"""How well the estimated gain tells the true one, and what the guard makes of the runs of the benchmark."""

from collections.abc import Sequence
from itertools import product
from statistics import mean, median
from typing import Any

from markdown_table import table_head, table_row
from scipy.stats import spearmanr

from apl_lightning.guard import LOSS_WEIGHT, Guard, careful_gain

Run = dict[str, Any]
Pair = tuple[float, float]  # estimated and true gain, in points

LIMITS = (0.0, 0.5, 0.75, 0.9)
LOSS_WEIGHTS = (1.0, LOSS_WEIGHT)
ENOUGH = 0.95  # of the gains must be kept
CLEAR = 2.0  # points of Dice by which a network must differ, for its sign to count
HARM = 0.5  # a run does harm if it ends more than this many points of Dice below what came in
GAIN = "pseudo/estimated_gain"


def outcome(run: Run, kept: float, loss_weight: float = LOSS_WEIGHT) -> float:
    """The gain of average Dice, in points, of the network that a guard with these limits ends with."""
    before = best = float(run["before"]["dice"]["average"])
    guard = Guard("restore", kept)
    *rounds, last = run["rounds"]
    for row in rounds:
        if guard.is_best(row[GAIN], _careful_gain(row, loss_weight)):
            best = row["val/dice/average"]
    end = best if guard.is_harmed(last[GAIN]) else float(last["val/dice/average"])
    return end - before


def _careful_gain(row: dict[str, float], loss_weight: float) -> float:
    return careful_gain([gain for name, gain in row.items() if name.startswith(f"{GAIN}/")], loss_weight)


def unguarded(run: Run) -> float:
    """The gain of the network of the last epoch."""
    return float(run["rounds"][-1]["val/dice/average"] - run["before"]["dice"]["average"])


def guard_table(runs: list[Run]) -> str:
    """Format how many runs do harm and how much gain stays, per data set and limit, also chosen on other data."""
    runs = [run for run in runs if run.get("rounds")]
    columns = [
        "data",
        "limit",
        "losses count",
        "runs",
        "harm without the guard",
        "harm with it",
        "mean gain without",
        "with",
        "kept of gains",
    ]
    lines = ["## Guard", "", table_head(*columns)]
    data = {name: [run for run in runs if run["data"] == name] for name in _data_sets(runs)}
    for name, of_data in data.items():
        lines += [_row(name, of_data, *both) for both in product(LIMITS, LOSS_WEIGHTS)]
    if len(data) > 1:
        for name, of_data in data.items():
            others = [run for other, found in data.items() if other != name for run in found]
            lines.append(_row(f"{name}, chosen on the others", of_data, *_chosen(others)))
        lines.append(_row("all, with the defaults", runs, Guard("restore").kept, LOSS_WEIGHT))
    return "\n".join(lines)


def _chosen(runs: list[Run]) -> tuple[float, float]:
    """The limit and the weight of losses with the least harm: of several, the most careful ones that keep enough."""

    def merit(both: tuple[float, float]) -> tuple[Any, ...]:
        harm = _harm([outcome(run, *both) for run in runs])
        return -harm, _kept(runs, *both) >= ENOUGH, both[1], both[0]

    return max(product(LIMITS, LOSS_WEIGHTS), key=merit)


def estimate_table(runs: list[Run]) -> str:
    """Format how the estimated gains of the networks of all rounds relate to their true gains on held-out patients."""
    lines = ["## Estimated gain", "", estimate_head("data")]
    for name in _data_sets(runs):
        if pairs := [pair for run in runs if run["data"] == name for pair in _estimates(run)]:
            lines.append(estimate_row(name, pairs))
    return "\n".join(lines)


def estimate_head(name: str) -> str:
    """The head of a table of estimated and true gains."""
    return table_head(name, "networks", "Spearman", "differ by more than 2", "sign right", "median error")


def estimate_row(name: str, pairs: Sequence[Pair]) -> str:
    """How the estimated gains of networks relate to the true ones."""
    clear = [(estimate, true) for estimate, true in pairs if abs(true) > CLEAR]
    right = sum(estimate * true > 0 for estimate, true in clear)
    error = median(abs(estimate - true) for estimate, true in pairs)
    order = float(spearmanr(pairs).statistic) if len(pairs) > 2 else float("nan")
    return table_row(name, str(len(pairs)), f"{order:.2f}", str(len(clear)), str(right), f"{error:.1f}")


def _estimates(run: Run) -> list[Pair]:
    """Estimated and true gain, in points, of each network of a run that differs from the one that came in."""
    before = float(run["before"]["dice"]["average"])
    rows = [(100 * row[GAIN], row["val/dice/average"] - before) for row in run.get("rounds", ())]
    return [(estimate, true) for estimate, true in rows if estimate != 0]


def _row(name: str, runs: list[Run], kept: float, loss_weight: float) -> str:
    before, after = [unguarded(run) for run in runs], [outcome(run, kept, loss_weight) for run in runs]
    cells = [
        name,
        f"{kept}",
        f"{loss_weight:g} x",
        str(len(runs)),
        str(_harm(before)),
        str(_harm(after)),
        f"{mean(before):.1f}",
        f"{mean(after):.1f}",
        f"{100 * _kept(runs, kept, loss_weight):.0f} %",
    ]
    return table_row(*cells)


def _harm(gains: Sequence[float]) -> int:
    return sum(gain < -HARM for gain in gains)


def _kept(runs: list[Run], kept: float, loss_weight: float) -> float:
    """The share of the mean gain of the runs that gain without the guard which is there with it."""
    good = [run for run in runs if unguarded(run) > 0]
    guarded = [outcome(run, kept, loss_weight) for run in good]
    return mean(guarded or [0]) / mean([unguarded(run) for run in good] or [1])


def _data_sets(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run["data"] for run in runs))

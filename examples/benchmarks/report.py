"""Tables of the benchmark of methods, from the files of its runs."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from math import isnan, nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from guarded import HARM, estimate_table, guard_table, unguarded
from markdown_table import table_head, table_row

Run = dict[str, Any]
Cell = tuple[str, str]  # a setting and a base


def read_runs(out: Path) -> list[Run]:
    """Read all completed runs."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/runs/*.json"))]


def write_report(out: Path) -> str:
    """Write `results.csv`, `patients.csv`, `rounds.csv` and `table.md` to the folder and return the table."""
    runs = read_runs(out)
    _write_csv(out / "results.csv", [{**_name(run), **_result(run)} for run in runs])
    _write_csv(out / "patients.csv", [row for run in runs for row in _patients(run)])
    rounds = [
        {**_name(run), "round": number, **row} for run in runs for number, row in enumerate(run.get("rounds", []))
    ]
    _write_csv(out / "rounds.csv", rounds)
    text = "\n\n".join([summary(runs), guard_table(runs), estimate_table(runs), *tables(runs)])
    (out / "table.md").write_text(text + "\n")
    return text


def summary(runs: list[Run]) -> str:
    """Format the gain of each method over all settings and bases, the worst of them, and how many runs do harm."""
    gains = {method: _gains(of_method) for method, of_method in _grouped(runs, "method").items() if method != "none"}
    cells = sorted({cell for found in gains.values() for cell in found})
    columns = [
        "method",
        "mean gain",
        "settings",
        "worst",
        "in",
        "harm",
        *(f"{setting}, {base}" for setting, base in cells),
    ]
    lines = ["## All settings", "", table_head(*columns)]
    for method, found in sorted(gains.items(), key=lambda item: mean(map(mean, item[1].values()))):
        means = {cell: mean(values) for cell, values in found.items()}
        worst = min(means, key=lambda cell: means[cell])
        every = [gain for values in found.values() for gain in values]
        harm = f"{sum(gain < -HARM for gain in every)} of {len(every)}"
        overall = f"{mean(means.values()):.1f}"
        first = [method, overall, f"{len(means)} of {len(cells)}", f"{means[worst]:.1f}", ", ".join(worst), harm]
        lines.append(table_row(*first, *(spread(found.get(cell, [])) for cell in cells)))
    return "\n".join(lines)


def tables(runs: list[Run]) -> Iterator[str]:
    """Format a table per setting and base: Dice per class, gain, share of the way to the oracle, distances, seconds."""
    for setting, of_setting in _grouped(runs, "setting").items():
        bases = _grouped(of_setting, "base")
        oracle = {run["seed"]: run["after"]["dice"]["average"] for run in bases.pop("oracle", [])}
        for base, of_base in bases.items():
            methods = sorted(_grouped(of_base, "method").items(), key=lambda item: mean(map(average, item[1])))
            names = list(of_base[0]["after"]["dice"])
            columns = [
                "method",
                *names,
                "gain",
                "without the guard",
                "way to the oracle",
                "ASSD, mm",
                "HD95, mm",
                "seconds",
            ]
            lines = [f"## {setting}, {base}", ""]
            lines += [f"Oracle, trained on target labels: {spread(list(oracle.values()))}.", ""] if oracle else []
            lines.append(table_head(*columns))
            for method, found in methods:
                dice = [spread([run["after"]["dice"][name] for run in found]) for name in names]
                lines.append(table_row(method, *dice, *_evaluated(found, oracle)))
            yield "\n".join(lines)


def _evaluated(runs: list[Run], oracle: dict[int, float]) -> list[str]:
    """Gain, also of the last epoch, share of the distance to the oracle, mean ASSD and HD95, seconds."""
    distances = [spread([distance(run, name) for run in runs]) for name in ("assd", "hd95")]
    if runs[0]["method"] == "none":
        return ["", "", "", *distances, ""]
    gains = [gain_of(run) for run in runs]
    way = mean(oracle.values()) - mean(run["before"]["dice"]["average"] for run in runs) if oracle else 0
    part = f"{100 * mean(gains) / way:.0f} %" if way > 0 else ""
    last = spread([unguarded(run) for run in runs])
    return [spread(gains), last, part, *distances, f"{mean(run['seconds'] for run in runs):.0f}"]


def _gains(runs: list[Run]) -> dict[Cell, list[float]]:
    found: dict[Cell, list[float]] = defaultdict(list)
    for run in runs:
        found[run["setting"], run["base"]].append(gain_of(run))
    return found


def gain_of(run: Run) -> float:
    """How much a run adds to the average Dice."""
    return average(run) - float(run["before"]["dice"]["average"])


def average(run: Run) -> float:
    """The average Dice after a run."""
    return float(run["after"]["dice"]["average"])


def distance(run: Run, name: str) -> float:
    """The mean over patients and classes that have a surface in prediction and reference; NaN if none has."""
    found = [organ[name] for patient in run["after"]["patients"].values() for organ in patient.values()]
    return mean([value for value in found if value is not None] or [nan])


def _grouped(runs: list[Run], key: str) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run[key]].append(run)
    return groups


def spread(values: list[float]) -> str:
    """Format the mean and, of several values, the standard deviation; of several NaN does not count."""
    if not values:
        return ""
    values = [value for value in values if not isnan(value)] or [nan]
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _name(run: Run) -> dict[str, Any]:
    return {key: run[key] for key in ("setting", "base", "method", "seed")}


def _result(run: Run) -> dict[str, Any]:
    dice = {f"{when}/{name}": value for when in ("before", "after") for name, value in run[when]["dice"].items()}
    distances = {f"after/{name}": distance(run, name) for name in ("assd", "hd95")}
    return {**dice, **distances, "seconds": run.get("seconds")}


def _patients(run: Run) -> Iterator[dict[str, Any]]:
    for patient, organs in run["after"]["patients"].items():
        for organ, values in organs.items():
            yield {**_name(run), "patient": patient, "class": organ, **values}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)

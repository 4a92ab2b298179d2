"""Tables of the benchmark of methods, from the files of its runs."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from criteria import criteria_table, guarded

Run = dict[str, Any]


def read_runs(folder: Path) -> list[Run]:
    """Read all completed runs."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def write_report(folder: Path) -> str:
    """Write `results.csv`, `rounds.csv` and `table.md` to the folder and return the table."""
    runs = read_runs(folder)
    _write_csv(folder / "results.csv", [_flat(run) for run in runs])
    named = [
        {"base": run["base"], "method": run["method"], "seed": run["seed"], "round": number, **row}
        for run in runs
        for number, row in enumerate(run.get("rounds", []))
    ]
    _write_csv(folder / "rounds.csv", named)
    text = "\n\n".join([table(runs), "### Criteria without labels", criteria_table(runs)])
    (folder / "table.md").write_text(text + "\n")
    return text


def table(runs: list[Run]) -> str:
    """Format a table per base: mean ± standard deviation over seeds, gain, share of the distance to the oracle."""
    found: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run["base"]][run["method"]].append(run)
    oracle = {run["seed"]: run["after"]["average"] for run in found.pop("oracle", {}).get("none", [])}
    parts = []
    if oracle:
        parts.append(f"Oracle (trained on the target's labels): {_spread(list(oracle.values()))} on average.")
    for base, methods in found.items():
        rows = sorted(methods.items(), key=lambda item: mean(run["after"]["average"] for run in item[1]))
        organs = list(rows[0][1][0]["after"])
        columns = [*organs, "gain", "of the way to the oracle", "with the guard", "pseudo labels by round", "seconds"]
        lines = [f"### From {base}", "", f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for method, of_method in rows:
            cells = [_spread([run["after"][organ] for run in of_method]) for organ in organs]
            lines.append(f"| {method} | {' | '.join([*cells, *_evaluated(of_method, oracle)])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _evaluated(runs: list[Run], oracle: dict[int, float]) -> list[str]:
    """Gain, share of the distance to the oracle, Dice with the guard and of the pseudo labels per round, seconds."""
    if runs[0]["method"] == "none":
        return [""] * 5
    gains = [run["after"]["average"] - run["before"]["average"] for run in runs]
    distances = [oracle[run["seed"]] - run["before"]["average"] for run in runs if run["seed"] in oracle]
    part = f"{sum(gains) / sum(distances):.0%}".replace("%", " %") if len(distances) == len(gains) else ""
    rounds = zip(*([row["pseudo/dice"] for row in run["rounds"] if "pseudo/dice" in row] for run in runs), strict=True)
    labels = ", ".join(f"{100 * mean(of_round):.1f}" for of_round in rounds)
    with_guard = [dice for run in runs if (dice := guarded(run)) is not None]
    return [_spread(gains), part, _spread(with_guard), labels, f"{mean(run['seconds'] for run in runs):.0f}"]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _flat(run: Run) -> dict[str, Any]:
    row = {key: run.get(key) for key in ("base", "method", "seed", "seconds")} | {"guarded/average": guarded(run)}
    for when in ("before", "after"):
        row |= {f"{when}/{organ}": value for organ, value in run[when].items()}
    return row


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)

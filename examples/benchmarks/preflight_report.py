"""Tables of the benchmark of preflight: what is found, and false alarms."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from markdown_table import table_head, table_row

from apl_lightning.preflight import MARGINS
from apl_lightning.preflight.decision import is_clear

Rows = list[dict[str, Any]]
Margins = Mapping[Any, float]

PLANTED = ("turn or flip", "inverted", "size", "range")
GRID = tuple(step / 20 for step in range(200))
WITH_BATCH_NORM = ("range", "size")  # views that a network without BatchNorm is not asked for
FALSE_ALARMS = 0.02  # of each kind of view, with the margins chosen on a data set


def all_tables(rows: Rows, whole: Rows) -> str:
    """All tables: of random volumes, and of whole data sets."""
    of_volumes = [make(rows) for make in (volumes_table, margins_table, kinds_table, misses_table)]
    return "\n\n".join([*of_volumes, whole_table(whole)])


def best(row: dict[str, Any], margins: Margins) -> dict[str, Any] | None:
    """The trial that preflight would report with these margins."""
    clear = [trial for trial in row["trials"] if _is_clear(trial, margins[trial["kind"]])]
    return max(clear, key=lambda trial: mean(trial["gains"]), default=None)


def _is_clear(trial: dict[str, Any], margin: float) -> bool:
    return is_clear(trial["gains"], margin, cases=1, likeness=trial["likeness"])


def clean(rows: Rows, domain: str = "target") -> Rows:
    """The rows of images as they are."""
    return [row for row in rows if row["domain"] == domain and not row["planted"]]


def found(rows: Rows, margins: Margins) -> float:
    """The share of rows in which what was planted is found; without anything planted, that of false alarms."""
    trials = [(row, best(row, margins)) for row in rows]
    right = [trial is not None and (trial["right"] or not row["planted"]) for row, trial in trials]
    return sum(right) / max(1, len(right))


def chosen_margins(rows: Rows) -> Margins:
    """For each kind of view the smallest margin with few false alarms on target images as they are."""
    chosen = {}
    for kind in MARGINS:
        found = [[trial for trial in row["trials"] if trial["kind"] == kind] for row in clean(rows)]
        allowed = int(FALSE_ALARMS * len(found))
        alarms = (sum(any(_is_clear(trial, margin) for trial in of_row) for of_row in found) for margin in GRID)
        chosen[kind] = next(margin for margin, count in zip(GRID, alarms, strict=True) if count <= allowed)
    return chosen


def volumes_table(rows: Rows) -> str:
    """Format what is found and the false alarms per setting, and per data set with margins of its own and others."""
    columns = ["volumes of", "margins", *(f"{name} found" for name in PLANTED)]
    lines = [table_head(*columns, "false alarms: source", "false alarms: target", "turned target found")]
    data = list(dict.fromkeys(row["data"] for row in rows))
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines.append(_line(setting, MARGINS, "default", [row for row in rows if row["setting"] == setting]))
    for name in data if len(data) > 1 else ():
        of_data, others = ([row for row in rows if (row["data"] == name) == same] for same in (True, False))
        lines.append(_line(name, chosen_margins(of_data), "chosen on these", of_data))
        lines.append(_line(name, chosen_margins(others), "chosen on the others", of_data))
    alone = [{**row, "trials": [_alone(t) for t in row["trials"] if t["kind"] not in WITH_BATCH_NORM]} for row in rows]
    lines.append(_line("all", MARGINS, "default", rows))
    return "\n".join([*lines, _line("all, by sureness alone", MARGINS, "default", alone)])


def _alone(trial: dict[str, Any]) -> dict[str, Any]:
    """The trial as it were of a network without BatchNorm."""
    return {**trial, "gains": trial["surer"], "likeness": None}


def margins_table(rows: Rows) -> str:
    """Format the margins that each data set chooses, and the default ones."""
    kinds = [kind for kind in MARGINS if kind != "channels"]
    lines = [table_head("margins", *kinds)]
    margins: dict[str, Margins] = {}
    for name in dict.fromkeys(row["data"] for row in rows):
        margins[f"chosen on {name}"] = chosen_margins([row for row in rows if row["data"] == name])
    margins["default"] = MARGINS
    return "\n".join(lines + [table_row(name, *(f"{m[kind]:.2f}" for kind in kinds)) for name, m in margins.items()])


def whole_table(rows: Rows) -> str:
    """Format what is found in the whole target data set of each setting, over all folds."""
    lines = [table_head("target images of", "false alarms", *PLANTED)]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of_setting = [row for row in rows if row["setting"] == setting]
        shares = [[row["found"] for row in of_setting if row["planted"] == name] for name in PLANTED]
        alarms = [row["found"] for row in of_setting if not row["planted"]]
        found = [f"{sum(share)} of {len(share)}" for share in (alarms, *shares)]
        lines.append(table_row(setting, *found))
    return "\n".join(lines)


def kinds_table(rows: Rows) -> str:
    """Format what is found of each kind of mistake."""
    lines = [table_head("planted", "volumes", "found")]
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] and row["domain"] == "source"):
        of_kind = [row for row in rows if row["kind"] == kind and row["domain"] == "source"]
        lines.append(table_row(kind, str(len(of_kind)), f"{100 * found(of_kind, MARGINS):.0f} %"))
    return "\n".join(lines)


def misses_table(rows: Rows) -> str:
    """Format how many planted mistakes are missed in the volumes of each patient with a miss."""
    lines = [table_head("patient", "planted", "missed")]
    planted = [row for row in rows if row["planted"] and row["domain"] == "source"]
    for case in sorted({row["case"] for row in planted}):
        of_case = [row for row in planted if row["case"] == case]
        if missed := sum(not found([row], MARGINS) for row in of_case):
            lines.append(table_row(case, str(len(of_case)), str(missed)))
    return "\n".join(lines)


def _line(name: str, margins: Margins, which: str, rows: Rows) -> str:
    def share(domain: str, planted: str) -> str:
        chosen = [row for row in rows if row["domain"] == domain and row["planted"] == planted]
        if planted in WITH_BATCH_NORM and not any(t["kind"] == planted for row in chosen for t in row["trials"]):
            return ""  # it was not asked for
        return f"{100 * found(chosen, margins):.0f} % of {len(chosen)}"

    cells = [*(share("source", mistake) for mistake in PLANTED), share("source", ""), share("target", "")]
    return table_row(name, which, *cells, share("target", "turn or flip"))

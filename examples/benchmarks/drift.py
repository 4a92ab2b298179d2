"""Compare long runs of the benchmark of methods with short ones: where do they end, and which class fades?

    python examples/benchmarks/methods.py --data ABDOMEN CARDIAC --methods "APL, defaults"
    python examples/benchmarks/methods.py --data ABDOMEN CARDIAC --methods "APL, defaults" --steps 2500 --out runs/long
    python examples/benchmarks/drift.py --short runs/methods --long runs/long

All figures are Dice in % on held-out patients. Best round: the highest average Dice of a long run, at the start of a
round or at its end.
"""

import argparse
from pathlib import Path

from markdown_table import table_head, table_row
from report import Run, read_runs

COLUMNS = ("setting", "base", "method", "seed", "before", "short", "long", "best round", "below it", "worst class")


def row(short: Run, long: Run) -> list[str]:
    """Where a long run ends, how far below its best round, and its worst class against the end of the short run."""
    before, end, short_end = (run["dice"]["average"] for run in (long["before"], long["after"], short["after"]))
    best = max(end, *(network["val/dice/average"] for network in long["rounds"]))
    ends = short["after"]["dice"]
    change = {name: round(dice - ends[name], 1) + 0.0 for name, dice in long["after"]["dice"].items()}  # no -0.0
    del change["average"]
    worst = min(change, key=lambda name: change[name])
    figures = [f"{value:.1f}" for value in (before, short_end, end, best, best - end)]
    return [*(str(long[key]) for key in COLUMNS[:4]), *figures, f"{worst} {change[worst]:+.1f}"]


def table(short: list[Run], long: list[Run]) -> str:
    """Format a row per long run that has a short one."""
    by_name = {tuple(run[key] for key in COLUMNS[:4]): run for run in short}
    lines = [table_head(*COLUMNS)]
    for run in long:
        other = by_name.get(tuple(run[key] for key in COLUMNS[:4]))
        if other is not None and run.get("rounds"):
            if abs(other["before"]["dice"]["average"] - run["before"]["dice"]["average"]) > 0.1:
                raise SystemExit(
                    f"Expected runs from one network, but those of {run['setting']} differ: copy the bases."
                )
            lines.append(table_row(*row(other, run)))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> str:
    """Run the command line and return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=Path, default=Path("runs/methods"), help="folder of the benchmark's runs")
    parser.add_argument("--long", type=Path, default=Path("runs/long"), help="folder of runs with more --steps")
    arguments = parser.parse_args(argv)
    found = table(read_runs(arguments.short), read_runs(arguments.long))
    print(found)
    return found


if __name__ == "__main__":
    main()

"""The paper's table: seven adaptation systems, each refined by APL.

    python examples/benchmarks/headline.py --data ABDOMEN

Adapts a network with each system of `examples/uda` (labelled source images, unlabelled target images), saves it with
the keys of the system's own code, loads it with `apl_lightning.checkpoints.load` and refines it on the unlabelled
target images. Other pseudo-label methods refine the system with the highest Dice on the validation patients. Only the
oracle trains on target labels. An interrupted benchmark continues with the missing runs. Writes `headline.md` and, as
`headline.png`, a slice with the labels of all systems before and after.

On a GPU the defaults are the official networks at 256 x 256.
"""

import argparse
import copy
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from bases import SYSTEMS, base_network, images_for
from evaluation import main_logits
from markdown_table import table_head, table_row
from methods import Task, add_arguments, budget_of, run_all, save_budget, train_bases
from panel import fullest_slice, save_panel
from report import Run, average, distance, gain_of, read_runs, spread
from settings import Setting, settings_of

TITLES = {
    "synseg": "SynSeg-Net",
    "adaptsegnet": "AdaOutput",
    "cyclegan": "CycleGAN",
    "cycada": "CyCADA",
    "advent": "ADVENT",
    "sifa-v1": "SIFA-v1",
    "sifa-v2": "SIFA-v2",
}
# Average Dice of the paper before and after APL; of other rows, after.
PAPER = {
    "synseg": (80.2, 82.53),
    "adaptsegnet": (81.6, 84.04),
    "cyclegan": (79.9, 82.3),
    "cycada": (80.1, 83.78),
    "advent": (82.79, 85.44),
    "sifa-v1": (83.1, 86.32),
    "sifa-v2": (83.7, 87.11),
}
PAPER_BOUNDS = {"plain": 58.2, "oracle": 88.7}
PAPER_PEERS = {"threshold": 77.59, "CBST": 84.11, "MRNet": 84.88}  # from SIFA-v1, whatever the best system is here
METHODS = ("APL, defaults", "APL, paper settings")
PEERS = tuple(name + suffix for suffix in ("", " + extras") for name in PAPER_PEERS)
BOUNDS = {"plain": "source only", "oracle": "oracle (trained on target labels)"}


def table(runs: list[Run]) -> str:
    """Format the Markdown table; each cell is a mean over seeds, with the standard deviation if there are several."""
    names = list(runs[0]["after"]["dice"])
    lines = [table_head("", *names, "gain", "ASSD, mm", "average in the paper")]
    for base, title in BOUNDS.items():
        lines += _row(title, _found(runs, base, "none"), names, f"{PAPER_BOUNDS[base]:.1f}")
    for system in SYSTEMS:
        before, after = PAPER[system]
        lines += _row(TITLES[system], _found(runs, system, "none"), names, f"{before:.1f}")
        for method, paper in zip(METHODS, (f"{after:.1f} ({after - before:+.1f})", ""), strict=True):
            lines += _row(f"{TITLES[system]} + {method}", _found(runs, system, method), names, paper)
    lines += [line for method in METHODS for line in _mean_gain(runs, method, len(names))]
    system = best(runs)
    for method in PEERS:
        paper = f"{PAPER_PEERS[method]:.1f} (from SIFA-v1)" if method in PAPER_PEERS else ""
        lines += _row(f"{TITLES[system]} + {method}", _found(runs, system, method), names, paper)
    return "\n".join(lines)


def best(runs: list[Run]) -> str:
    """The system with the highest mean Dice before refinement, on which the other methods run."""
    scores = {system: mean(map(average, found)) for system in SYSTEMS if (found := _found(runs, system, "none"))}
    return max(scores, key=lambda system: scores[system])


def _row(title: str, runs: list[Run], names: list[str], paper: str) -> list[str]:
    if not runs:
        return []
    dice = [spread([run["after"]["dice"][name] for run in runs]) for name in names]
    gained = "" if runs[0]["method"] == "none" else spread([gain_of(run) for run in runs])
    distances = spread([distance(run, "assd") for run in runs])
    return [table_row(title, *dice, gained, distances, paper)]


def _mean_gain(runs: list[Run], method: str, columns: int) -> list[str]:
    """A row with the mean gain over the systems, the smallest and the largest, and the paper's for the same systems."""
    gains = {system: mean(map(gain_of, found)) for system in SYSTEMS if (found := _found(runs, system, method))}
    if not gains:
        return []
    cell = f"{mean(gains.values()):+.1f} ({min(gains.values()):+.1f} to {max(gains.values()):+.1f})"
    paper = f"{mean(PAPER[system][1] - PAPER[system][0] for system in gains):+.1f}" if method == METHODS[0] else ""
    title = f"{method}: mean gain of {len(gains)} systems"
    return [table_row(title, *[""] * columns, cell, "", paper)]


def _found(runs: list[Run], base: str, method: str) -> list[Run]:
    return [run for run in runs if (run["base"], run["method"]) == (base, method)]


def picture(setting: Setting, systems: list[str], method: str, seed: int, path: Path) -> None:
    """Draw one slice of a validation patient with one row per system: before and after a method, and the reference.

    The slice is the one in which the smallest organ has most pixels.
    """
    held_out = setting.read("target_val")
    shown = fullest_slice(held_out)
    columns: dict[str, list[torch.Tensor]] = {"before": [], f"after {method}": []}
    for system in systems:
        network = base_network(system, setting, seed)
        image = images_for(network, setting, "target_val").images[shown][None]
        refined = copy.deepcopy(network)
        refined.load_state_dict(torch.load(Task(setting, system, method, seed).network, weights_only=True))
        for found, column in zip((network, refined), columns.values(), strict=True):
            with torch.no_grad():
                column.append(main_logits(found, image)[0].argmax(0))
    columns["reference"] = [held_out.labels[shown]] * len(systems)
    save_panel(path, [held_out.images[shown]] * len(systems), columns, [TITLES[system] for system in systems])


def main(argv: list[str] | None = None) -> str:
    """Run the command line and return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json")
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--chosen", choices=SYSTEMS, nargs="+", default=list(SYSTEMS), help="systems to run")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--peers", choices=PEERS, nargs="*", default=list(PEERS), help="methods on the best system")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    budget = budget_of(arguments)
    save_budget(arguments.out, budget)
    setting = settings_of(arguments.data, arguments.out, budget)[0]
    seeds, jobs = arguments.seeds, arguments.jobs
    train_bases([setting], [*BOUNDS, *arguments.chosen], seeds, jobs)
    run_all([Task(setting, *run) for run in product(arguments.chosen, arguments.methods, seeds)], jobs)
    # The folder may hold runs of other settings, systems and seeds.
    of_these = partial(_runs_of, arguments.out, setting, {*BOUNDS, *arguments.chosen}, seeds)
    run_all([Task(setting, best(of_these()), *run) for run in product(arguments.peers, seeds)], jobs)
    text = table(of_these())
    (arguments.out / "headline.md").write_text(text + "\n")
    picture(setting, arguments.chosen, arguments.methods[0], seeds[0], arguments.out / "headline.png")
    print(f"\nDice (%) on the validation patients, {len(seeds)} seed(s):\n\n{text}")
    return text


def _runs_of(out: Path, setting: Setting, bases: set[str], seeds: list[int]) -> list[Run]:
    runs = [run for run in read_runs(out) if run["setting"] == setting.name]
    return [run for run in runs if run["base"] in bases and run["seed"] in seeds]


if __name__ == "__main__":
    main()

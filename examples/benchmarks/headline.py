"""The paper's table: seven adaptation systems, each refined by APL.

    python examples/benchmarks/headline.py --data ABDOMEN

Adapts a network with each system of `examples/uda` (labelled source images, unlabelled target images), saves it in the
system's own format, loads it with `apl_lightning.checkpoints.load` and refines it on the unlabelled target images.
Other pseudo-label methods refine the system with the highest Dice, as in the paper. Target labels only evaluate; all
runs have a fixed number of steps. An interrupted benchmark continues with the missing runs. Writes `headline.md` and,
as `headline.png`, a slice with the labels of all systems before and after.

On a GPU the defaults are the official networks at 256 x 256.
"""

import argparse
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from bases import SYSTEMS, base_network, images_for
from evaluation import main_logits
from methods import Task, add_arguments, budget_of, run_all, train_bases
from panel import save_panel
from recipes import RECIPES
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
PAPER_PEERS = {"threshold": 77.59, "CBST": 84.11, "MRNet": 84.88}  # from SIFA-v1
METHODS = ("APL, defaults", "APL, paper settings")
PEERS = tuple(name + suffix for name in PAPER_PEERS for suffix in ("", " + extras"))
BOUNDS = {"plain": "source only", "oracle": "oracle (trained on target labels)"}


def table(runs: list[Run]) -> str:
    """Format the Markdown table; each cell is a mean over seeds, with the standard deviation if there are several."""
    names = list(runs[0]["after"]["dice"])
    header = ["", *names, "gain", "ASSD, mm", "average in the paper"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for base, title in BOUNDS.items():
        lines += _row(title, _found(runs, base, "none"), names, f"{PAPER_BOUNDS[base]:.1f}")
    for system in SYSTEMS:
        before, after = PAPER[system]
        lines += _row(TITLES[system], _found(runs, system, "none"), names, f"{before:.1f}")
        for method, paper in zip(METHODS, (f"{after:.1f} (+{after - before:.1f})", ""), strict=True):
            lines += _row(f"{TITLES[system]} + {method}", _found(runs, system, method), names, paper)
    lines += [line for method in METHODS for line in _mean_gain(runs, method, len(names))]
    if found := best(runs):
        for method in PEERS:
            paper = f"{PAPER_PEERS[method]:.1f}" if method in PAPER_PEERS else ""
            lines += _row(f"{TITLES[found]} + {method}", _found(runs, found, method), names, paper)
    return "\n".join(lines)


def best(runs: list[Run]) -> str | None:
    """The system with the highest mean Dice before refinement, on which the other methods run."""
    scores = {system: mean(map(average, found)) for system in SYSTEMS if (found := _found(runs, system, "none"))}
    return max(scores, key=lambda system: scores[system], default=None)


def _row(title: str, runs: list[Run], names: list[str], paper: str) -> list[str]:
    if not runs:
        return []
    dice = [spread([run["after"]["dice"][name] for run in runs]) for name in names]
    gained = "" if runs[0]["method"] == "none" else spread([gain_of(run) for run in runs])
    distances = spread([distance(run, "assd") for run in runs])
    return [f"| {' | '.join([title, *dice, gained, distances, paper])} |"]


def _mean_gain(runs: list[Run], method: str, columns: int) -> list[str]:
    """A row with the mean gain over the systems, and the smallest and the largest."""
    gains = [mean(map(gain_of, found)) for system in SYSTEMS if (found := _found(runs, system, method))]
    if not gains:
        return []
    cell = f"{mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"
    paper = mean(after - before for before, after in PAPER.values()) if method == METHODS[0] else None
    empty = [""] * columns
    title = f"mean gain of {len(gains)}, {method}"
    return [f"| {' | '.join([title, *empty, cell, '', '' if paper is None else f'{paper:+.1f}'])} |"]


def _found(runs: list[Run], base: str, method: str) -> list[Run]:
    return [run for run in runs if (run["base"], run["method"]) == (base, method)]


def picture(setting: Setting, systems: list[str], seed: int, path: Path) -> None:
    """Draw one slice of a held-out patient: before and after in one row per system, then the reference.

    The slice is the one in which the smallest organ has most pixels.
    """
    held_out = setting.read("target_val")
    classes = len(setting.class_names)
    sizes = [torch.bincount(label.flatten(), minlength=classes)[1:].min() for label in held_out.labels]
    shown = max(range(len(sizes)), key=lambda index: sizes[index])
    rows: dict[str, list[torch.Tensor]] = {"before": [], "after APL": [], "reference": []}
    for system in systems:
        network = base_network(system, setting, seed)
        image = images_for(network, setting, "target_val").images[shown][None]
        refined = torch.load(Task(setting, system, METHODS[0], seed).network, weights_only=True)
        for column in ("before", "after APL"):
            with torch.no_grad():
                rows[column].append(main_logits(network, image)[0].argmax(0))
            network.load_state_dict(refined)
        rows["reference"].append(held_out.labels[shown])
    titles = [TITLES[system] for system in systems]
    save_panel(path, [held_out.images[shown]] * len(systems), rows, titles)


def main(argv: list[str] | None = None) -> str:
    """Run the command line and return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json")
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--chosen", choices=SYSTEMS, nargs="+", default=list(SYSTEMS), help="systems to run")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--peers", choices=RECIPES, nargs="*", default=list(PEERS), help="methods on the best system")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    setting = settings_of(arguments.data, arguments.out, budget_of(arguments))[0]
    seeds, jobs = arguments.seeds, arguments.jobs
    train_bases([setting], [*BOUNDS, *arguments.chosen], seeds, jobs)
    run_all([Task(setting, *run) for run in product(arguments.chosen, arguments.methods, seeds)], jobs)
    system = best(read_runs(arguments.out))
    run_all([Task(setting, system, *run) for run in product(arguments.peers, seeds)], jobs)
    text = table(read_runs(arguments.out))
    (arguments.out / "headline.md").write_text(text + "\n")
    picture(setting, arguments.chosen, seeds[0], arguments.out / "headline.png")
    print(f"\nDice (%) on held-out patients, {len(seeds)} seed(s):\n\n{text}")
    return text


if __name__ == "__main__":
    main()

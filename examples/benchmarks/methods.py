"""Compare pseudo-label methods: each method refines each base network on unlabelled images, in several settings.

    python examples/benchmarks/methods.py --data ABDOMEN CARDIAC

Each folder of `--data` holds the volumes of two modalities (see `examples/slices.py`) and gives two settings, one per
direction. All runs have the same number of steps. Evaluated is the network of the last one, or that which the guard
chooses, on held-out patients. Training and model selection never read target labels. Only the oracle and the logged
Dice of the pseudo labels use them.

Each run writes a JSON file to `OUT/SETTING/runs`; an interrupted benchmark continues with the missing runs. From these
files it writes `results.csv` (one row per run), `patients.csv` (one row per run, patient and class, with surface
distances in mm), `rounds.csv` (one row per round) and `table.md`.

On a GPU the default is a ResNet-50 DeepLabV3+ at 256 x 256.
"""

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from bases import BASES, SYSTEM_SIZES, SYSTEMS, base_network, images_for
from evaluation import organ_dice, patient_dice, predict
from networks import NETWORKS, save_weights
from recipes import MORE, RECIPES
from report import write_report
from settings import Budget, Setting, all_settings, trainer
from surfaces import surface_distances

from apl_lightning import PseudoLabelCallback, TargetDataModule


class Task(NamedTuple):
    """One run; the method "none" only trains and evaluates the base."""

    setting: Setting
    base: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.setting.name}, {self.base}, {self.method}, {self.seed}"

    @property
    def path(self) -> Path:
        """The file of its result."""
        name = f"{self.base}--{self.method.replace(' ', '-')}--{self.seed}.json"
        return self.setting.out / "runs" / name

    @property
    def network(self) -> Path:
        """The file of the refined network's state dict."""
        return self.path.with_suffix(".pt")


class Rounds(pl.Callback):
    """Records the scores of each round, and the Dice on held-out patients of the network that made its labels."""

    def __init__(self, labels: PseudoLabelCallback, setting: Setting, held_out: Any) -> None:
        self.labels = labels
        self.setting = setting
        self.held_out = held_out
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0  # spent on recording, not part of the time of a method

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        if self.labels.round == len(self.rows):
            self.record(module, self.labels.statistics)

    def record(self, module: Any, statistics: dict[str, float]) -> None:
        """Add a row with the statistics of a network and its Dice."""
        start = time.perf_counter()
        dice = organ_dice(predict(module.export(), self.held_out), self.held_out, self.setting.class_names)
        self.rows.append({**statistics, **{f"val/dice/{name}": value for name, value in dice.items()}})
        self.seconds += time.perf_counter() - start


class Last(pl.Callback):
    """Records the network of the last epoch, before the guard may return to another one."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        start = time.perf_counter()
        gains = self.rounds.labels.measure(trainer, module)
        self.rounds.seconds += time.perf_counter() - start
        self.rounds.record(module, gains)


def evaluate(network: torch.nn.Module, held_out: Any, class_names: list[str]) -> dict[str, Any]:
    """Dice per class, and Dice and surface distances per patient and class."""
    predictions = predict(network, held_out)
    dice = patient_dice(predictions, held_out, class_names)
    distances = surface_distances(predictions, held_out, class_names)
    patients = {
        patient: {name: {"dice": dice[patient].get(name), **found} for name, found in by_class.items()}
        for patient, by_class in distances.items()
    }
    return {"dice": organ_dice(predictions, held_out, class_names), "patients": patients}


def refine(task: Task) -> dict[str, Any]:
    """Run one method and return the evaluation before and after, the rounds and the seconds."""
    setting, seed, names = task.setting, task.seed, task.setting.class_names
    network = base_network(task.base, setting, seed)
    held_out, images = (images_for(network, setting, split) for split in ("target_val", "target_adapt"))
    before = organ_dice(predict(network, held_out), held_out, names)
    recipe = (RECIPES | MORE)[task.method]
    pl.seed_everything(seed, workers=True, verbose=False)
    module = recipe.module(network, len(names), names, **recipe.options)
    epochs = max(1, round(setting.budget.round_steps * 8 / len(images)))
    labels = PseudoLabelCallback(**{"every_n_epochs": epochs, **recipe.callback()})
    rounds = Rounds(labels, setting, held_out)
    with TemporaryDirectory() as folder:
        data = TargetDataModule(images, store_dir=folder, **recipe.data)
        start = time.perf_counter()
        callbacks = [Last(rounds), labels, rounds]
        trainer(setting.budget, max_steps=setting.budget.steps, callbacks=callbacks).fit(module, data)
        seconds = time.perf_counter() - start - rounds.seconds
    refined = module.export()
    save_weights(refined.state_dict(), task.network)
    after = evaluate(refined, held_out, names)
    return {"before": {"dice": before}, "after": after, "rounds": rounds.rows, "seconds": seconds}


def work(task: Task, threads: int) -> str:
    """Run one task unless its file exists."""
    torch.set_num_threads(threads)
    if task.path.exists():
        return "already done"
    if task.method == "none":
        network = base_network(task.base, task.setting, task.seed)
        evaluation = evaluate(network, images_for(network, task.setting, "target_val"), task.setting.class_names)
        result = {"before": evaluation, "after": evaluation}
    else:
        result = refine(task)
    named = {
        "data": task.setting.data.name,
        "setting": task.setting.name,
        "base": task.base,
        "method": task.method,
        "seed": task.seed,
        **result,
    }
    task.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = task.path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(named, indent=1))
    unfinished.replace(task.path)
    return f"{result['before']['dice']['average']:.1f} to {result['after']['dice']['average']:.1f}"


def run_all(tasks: list[Task], jobs: int) -> None:
    """Run the tasks, `jobs` at a time; with one job, in this process."""
    threads = max(1, torch.get_num_threads() // jobs)
    if jobs == 1:
        for done, task in enumerate(tasks, start=1):
            print(f"{done}/{len(tasks)} {task}: {work(task, threads)}", flush=True)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(work, task, threads): task for task in tasks}
        for done, future in enumerate(as_completed(running), start=1):
            try:
                print(f"{done}/{len(tasks)} {running[future]}: {future.result()}", flush=True)
            except Exception:
                print(f"{running[future]}: failed, so tasks that have not begun are left out", flush=True)
                pool.shutdown(cancel_futures=True)
                raise


def save_budget(out: Path, budget: Budget) -> None:
    """Save the budget next to the runs; refuse a folder with runs of another one."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "budget.json"
    now = json.loads(
        json.dumps({**budget._asdict(), "systems": {budget.systems: SYSTEM_SIZES[budget.systems]._asdict()}})
    )
    if path.exists() and (before := json.loads(path.read_text())) != now:
        changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
        raise SystemExit(f"{out} holds runs of another budget (before, now): {changed}. Pass another --out.")
    path.write_text(json.dumps(now, indent=1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that make a budget, and those of `run_all`."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", choices=NETWORKS, default="smp-deeplabv3plus" if gpu else "monai-unet")
    parser.add_argument("--systems", choices=SYSTEM_SIZES, default="official" if gpu else "small")
    parser.add_argument("--size", type=int, default=256 if gpu else 128, help="number of rows and columns of a slice")
    parser.add_argument("--every", type=int, default=2, help="refine on every n-th target slice")
    parser.add_argument("--steps", type=int, default=500, help="steps of refinement")
    parser.add_argument(
        "--round-steps", type=int, default=40, help="about so many steps with the same labels, but at least one epoch"
    )
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="bf16-mixed")
    parser.add_argument("--source-steps", type=int, default=1650)
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the patients")
    parser.add_argument("--jobs", type=int, default=1 if gpu else torch.get_num_threads(), help="parallel runs")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one seed, a few small images and steps")


def budget_of(arguments: argparse.Namespace) -> Budget:
    """The budget of all runs; `--quick` overrides the arguments."""
    if arguments.quick:
        smallest = {"size": 32, "every": 1, "steps": 4, "round_steps": 1, "source_steps": 2, "fraction": 0.05}
        vars(arguments).update(smallest, seeds=[0], systems="smoke test")
    return Budget(**{name: getattr(arguments, name) for name in Budget._fields})


def train_bases(settings: list[Setting], bases: Iterable[str], seeds: list[int], jobs: int) -> None:
    """Train and evaluate the bases, in order of dependence, so that no two jobs train the same one."""
    needed = set(bases)
    needed |= {"cyclegan"} if "cycada" in needed else set()
    needed |= {"plain"} if "cyclegan" in needed else set()
    waves = (needed - set(SYSTEMS), needed & set(SYSTEMS) - {"cycada"}, needed & {"cycada"})
    for kinds in waves:
        tasks = [Task(s, kind, "none", seed) for seed, s, kind in product(seeds, settings, sorted(kinds))]
        run_all(tasks, jobs)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with meta.json")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--settings", nargs="+", help="names, such as abdomen-mr-to-ct; all by default")
    parser.add_argument("--bases", choices=BASES, nargs="+", default=["plain", "remapped", "advent", "oracle"])
    parser.add_argument("--methods", choices=RECIPES | MORE, nargs="+", default=list(RECIPES))
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    budget = budget_of(arguments)
    save_budget(arguments.out, budget)
    settings = {setting.name: setting for setting in all_settings(arguments.data, arguments.out, budget)}
    if unknown := set(arguments.settings or ()) - set(settings):
        parser.error(f"Expected --settings among {list(settings)}, but got {sorted(unknown)}.")
    chosen = [settings[name] for name in arguments.settings or settings]
    train_bases(chosen, arguments.bases, arguments.seeds, arguments.jobs)
    refined = [base for base in arguments.bases if base != "oracle"]
    runs = product(arguments.seeds, chosen, refined, arguments.methods)
    run_all([Task(setting, base, method, seed) for seed, setting, base, method in runs], arguments.jobs)
    print("\n" + write_report(arguments.out))


if __name__ == "__main__":
    main()

"""Compare pseudo-label methods: each method refines each base network on unlabelled images, for several seeds.

    python examples/benchmarks/methods.py --data DIR

All runs have the same number of epochs and are evaluated after the last one, on held-out patients. Training and model
selection never read target labels. Only the oracle and the logged Dice of the pseudo labels use them.

Each run writes a JSON file to `OUT/runs`; an interrupted benchmark continues with the missing runs. From these files it
writes `results.csv` (one row per run), `rounds.csv` (one row per round) and `table.md` (mean and standard deviation
over seeds).

On a GPU the default is a ResNet-50 DeepLabV3+ at 256 x 256.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from bases import BASES, CLASS_NAMES, SPLITS, Setting, base_network, trainer
from evaluation import organ_dice, predict
from networks import NETWORKS
from recipes import MORE, RECIPES
from report import write_report

from apl_lightning import PseudoLabelCallback, TargetDataModule


class Rounds(pl.Callback):
    """Records the scores of each round, and the Dice on held-out patients of the network that made its labels."""

    def __init__(self, labels: PseudoLabelCallback, held_out: Any) -> None:
        self.labels = labels
        self.held_out = held_out
        self.rows: list[dict[str, float]] = []
        self.dice: dict[str, float] = {}  # of the latest round, per organ
        self.seconds = 0.0  # spent on recording, not part of the time of a method

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._record(trainer, module, made=self.labels.round == sum("pseudo/dice" in row for row in self.rows))

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._record(trainer, module, made=False)

    def _record(self, trainer: pl.Trainer, module: Any, made: bool) -> None:
        start = time.perf_counter()
        scores = self.labels.scores if made else self.labels.measure(trainer, module)
        labels = {"pseudo/dice": self.labels.statistics["pseudo/dice"]} if made else {}
        self.dice = _dice(module.export(), self.held_out)
        self.rows.append({**scores, **labels, "val/dice": self.dice["average"]})
        self.seconds += time.perf_counter() - start


def _dice(network: torch.nn.Module, held_out: Any) -> dict[str, float]:
    return organ_dice(predict(network, held_out), held_out, CLASS_NAMES)


def refine(base: str, method: str, seed: int, setting: Setting) -> dict[str, Any]:
    """Run one method and return the Dice before and after, the rounds and the seconds."""
    network, held_out = base_network(base, setting, seed), setting.read("target_val")
    network = network.to(memory_format=torch.channels_last)
    recipe = (RECIPES | MORE)[method]
    before = _dice(network, held_out)
    pl.seed_everything(seed, workers=True, verbose=False)
    module = recipe.module(network, len(CLASS_NAMES), CLASS_NAMES, **recipe.options)
    labels = PseudoLabelCallback(**recipe.callback())
    rounds = Rounds(labels, held_out)
    with TemporaryDirectory() as folder:
        data = TargetDataModule(setting.read("target_adapt"), store_dir=folder, **recipe.data)
        start = time.perf_counter()
        trainer(setting.epochs, precision=setting.precision, callbacks=[labels, rounds]).fit(module, data)
        seconds = time.perf_counter() - start - rounds.seconds
    run = {"base": base, "method": method, "seed": seed, "seconds": seconds}
    return {**run, "before": before, "after": rounds.dice, "rounds": rounds.rows}


def work(task: tuple[str, str, int], setting: Setting, threads: int) -> str:
    """Run one task unless its file exists; the method "none" only trains and evaluates the base."""
    torch.set_num_threads(threads)
    base, method, seed = task
    path = setting.out / "runs" / f"{base}--{method.replace(' ', '-')}--{seed}.json"
    if path.exists():
        return "already done"
    if method == "none":
        dice = _dice(base_network(base, setting, seed), setting.read("target_val"))
        result: dict[str, Any] = {"base": base, "method": method, "seed": seed, "before": dice, "after": dice}
    else:
        result = refine(base, method, seed, setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1))
    unfinished.replace(path)
    return f"{result['before']['average']:.1f} to {result['after']['average']:.1f}"


def run_all(tasks: list[tuple[str, str, int]], setting: Setting, jobs: int) -> None:
    """Run the tasks, `jobs` at a time; with one job, in this process."""
    threads = max(1, torch.get_num_threads() // jobs)

    def report(done: int, task: tuple[str, str, int], outcome: str) -> None:
        print(f"{done}/{len(tasks)} {', '.join(map(str, task))}: {outcome}", flush=True)

    if jobs == 1:
        for done, task in enumerate(tasks, start=1):
            report(done, task, work(task, setting, threads))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(work, task, setting, threads): task for task in tasks}
        for done, future in enumerate(as_completed(running), start=1):
            report(done, running[future], future.result())


def check_setting(setting: Setting) -> None:
    """Save the setting next to the runs; refuse a folder with runs of another setting."""
    setting.out.mkdir(parents=True, exist_ok=True)
    path = setting.out / "setting.json"
    now = {name: value for name, value in setting._asdict().items() if name not in ("data", "out")}
    if path.exists() and (before := json.loads(path.read_text())) != now:
        changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
        raise SystemExit(f"{setting.out} holds runs of another setting (before, now): {changed}. Pass another --out.")
    path.write_text(json.dumps(now, indent=1))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json, mr/ and ct/")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--direction", choices=SPLITS, default="mr-to-ct")
    parser.add_argument("--bases", choices=BASES, nargs="+", default=list(BASES))
    parser.add_argument("--methods", choices=RECIPES | MORE, nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--network", choices=NETWORKS, default="smp-deeplabv3plus" if gpu else "monai-unet")
    parser.add_argument("--size", type=int, default=256 if gpu else 128, help="number of rows and columns of a slice")
    parser.add_argument("--every", type=int, default=2, help="train on every n-th target slice")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of refinement")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="bf16-mixed")
    parser.add_argument("--source-epochs", type=int, default=30)
    parser.add_argument("--advent-epochs", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the patients")
    parser.add_argument("--jobs", type=int, default=1 if gpu else torch.get_num_threads(), help="parallel runs")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one seed, a few small images, one epoch")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        smallest = {"seeds": [0], "size": 32, "every": 1, "epochs": 1, "source_epochs": 1, "advent_epochs": 1}
        vars(arguments).update(smallest, fraction=0.05)

    out = arguments.out / arguments.direction
    options = {name: value for name, value in vars(arguments).items() if name in Setting._fields}
    setting = Setting(**{**options, "out": out})
    check_setting(setting)
    seeds = arguments.seeds
    # The bases come first, in order of dependence, so that no two runs train the same base.
    for kinds in (("remapped", "plain", "oracle"), ("remapped-bn", "advent")):
        run_all([(kind, "none", seed) for seed, kind in product(seeds, kinds)], setting, arguments.jobs)
    runs = list(product(arguments.bases, arguments.methods, seeds))
    run_all(sorted(runs, key=lambda run: (run[2], arguments.bases.index(run[0]))), setting, arguments.jobs)
    print("\n" + write_report(out))


if __name__ == "__main__":
    main()

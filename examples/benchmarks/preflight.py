"""Does preflight find planted turns, flips, inversions and wrong scales, and is it silent on another modality?

    python examples/benchmarks/preflight.py --data ABDOMEN CARDIAC

Each folder of `--data` holds the volumes of two modalities (see `examples/slices.py`) and gives two settings, one per
direction. The patients are held out in turn, in folds, so that no single patient decides. In each fold and setting a
plain source network is trained with the budget of `methods.py`, which has run before, and:

- A mistake is planted in random volumes of the source modality: random blocks of slices of held-out patients, with
  small random moves and changes of intensity. It is found if the best view undoes it.
- Random volumes of the target modality are left as they are. Anything that is found there is a false alarm.
- Each mistake is planted in the target data set as a whole, which is how preflight is used.

Margins are also chosen on one data set and judged on the other one: for each kind of view the smallest with at most 2 %
false alarms on the target images as they are.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bases import base_network
from folds import fold_of
from methods import save_budget
from preflight_report import Rows, all_tables
from settings import Setting, all_settings, read_budget
from slices import Slices
from torch import Tensor
from torch.nn import functional as F

from apl_lightning.preflight import PreflightReport, View, preflight

SHARE = 0.6  # of its slices: the shortest block


class Mistake(NamedTuple):
    """A planted mistake, and whether a view undoes it."""

    kind: str
    plant: Callable[[Tensor], Tensor]
    undone_by: Callable[[View], bool]


def turn(images: Tensor, times: int, mirrored: bool) -> Tensor:
    """Mirror images and rotate them by 90 degrees a number of times."""
    return torch.rot90(images.flip(-1) if mirrored else images, times, (-2, -1))


def turns() -> list[Mistake]:
    """The 7 turns and flips."""
    marks = torch.arange(16.0).view(1, 1, 4, 4)
    found = []
    for times, mirrored in ((t, m) for m in (False, True) for t in range(4) if t or m):
        plant = partial(turn, times=times, mirrored=mirrored)
        turned = plant(marks)

        def undone(view: View, planted: Tensor = turned) -> bool:
            return view.kind == "orientation" and torch.equal(view.change(planted), marks)

        found.append(Mistake("turn or flip", plant, undone))
    return found


def sizes() -> list[Mistake]:
    """Images on a wrong grid: the same field of view with other pixels."""
    found = []
    for factor in (1.5, 1 / 1.5, 2.0, 0.5):

        def plant(images: Tensor, factor: float = factor) -> Tensor:
            size = [16 * round(factor * extent / 16) for extent in images.shape[2:]]
            return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)

        def undone(view: View, factor: float = factor) -> bool:
            return view.kind == "size" and (view.enlarges < 1) == (factor > 1)

        found.append(Mistake(f"size x {factor:.2g}", plant, undone))
    return found


MISTAKES = {
    "turn or flip": turns(),
    "inverted": [Mistake("inverted", lambda images: 1 - images, lambda view: view.kind == "inverted")],
    "size": sizes(),
    "range": [
        Mistake("0 to 255", lambda images: 255 * images, lambda view: view.kind == "range"),
        Mistake("-1 to 1", lambda images: 2 * images - 1, lambda view: view.kind == "range"),
    ],
}


def random_volume(data: Slices, most: int, generator: random.Random) -> tuple[str, Tensor]:
    """A random patient, and slices (B, 1, S, S) of a random block, moved and changed in intensity by a little."""
    patient = generator.choice(sorted(set(data.cases)))
    slices = data.images[[index for index, case in enumerate(data.cases) if case == patient]]
    length = generator.randint(math.ceil(SHARE * len(slices)), len(slices))
    start = generator.randint(0, len(slices) - length)
    images = slices[torch.linspace(start, start + length - 1, min(most, length)).round().long()]
    angle, zoom = math.radians(generator.uniform(-8, 8)), generator.uniform(0.95, 1.05)
    move = [generator.uniform(-0.05, 0.05) for _ in range(2)]
    rows = [[math.cos(angle), -math.sin(angle), move[0]], [math.sin(angle), math.cos(angle), move[1]]]
    theta = zoom * torch.tensor(rows).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)
    return patient, (moved ** generator.uniform(0.85, 1.15) * generator.uniform(0.9, 1.1)).clamp(0, 1)


def report_of(network: torch.nn.Module, images: Tensor, cases: Sequence[str], setting: Setting) -> PreflightReport:
    """Run preflight in the precision that the network was trained with."""
    samples = [{"image": image, "case": case} for image, case in zip(images, cases, strict=True)]
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.budget.precision == "bf16-mixed"):
        return preflight(network, samples, num_classes=len(setting.class_names))


class Direction:
    """A source network of a fold, with volumes of its modality and of the other one."""

    def __init__(self, setting: Setting, held_out: Slices, fold: int, most: int) -> None:
        self.setting = setting
        self.most = most
        self.fold = fold
        self.network = base_network("plain", setting, fold).to(memory_format=torch.channels_last)
        self.source = held_out
        self.target = setting.read("target_adapt", labelled=False)
        self.generator = random.Random(f"{setting.name}, fold {fold}")

    def run(self, number: int) -> Rows:
        """The rows of one random volume of each domain; `number` says which mistakes are planted."""
        volumes = [random_volume(data, self.most, self.generator) for data in (self.source, self.target)]
        (case, source), (other, target) = volumes
        planted = {name: mistakes[number % len(mistakes)] for name, mistakes in MISTAKES.items()}
        rows = [self._row("source", case, "", source, None), self._row("target", other, "", target, None)]
        rows += [self._row("source", case, name, source, mistake) for name, mistake in planted.items()]
        return [*rows, self._row("target", other, "turn or flip", target, planted["turn or flip"])]

    def run_whole(self) -> Rows:
        """A row per mistake in the whole target data set: whether preflight reports what undoes it, or anything."""
        rows = []
        for name, mistakes in {"": [None], **MISTAKES}.items():
            for mistake in mistakes:
                images = self.target.images if mistake is None else mistake.plant(self.target.images)
                found = report_of(self.network, images, self.target.cases, self.setting).found
                right = found is not None and (mistake is None or mistake.undone_by(found.view))
                rows.append({"setting": self.setting.name, "planted": name, "found": right})
        return rows

    def _row(self, domain: str, case: str, name: str, images: Tensor, mistake: Mistake | None) -> dict[str, Any]:
        """What was planted, and of each view its kind, its gain and whether it undoes that."""
        images = images if mistake is None else mistake.plant(images)
        trials = report_of(self.network, images, [case] * len(images), self.setting).trials
        tried = [
            {
                "kind": one.view.kind,
                "gains": one.gains,
                "surer": one.surer,
                "likeness": one.likeness,
                "right": mistake is not None and mistake.undone_by(one.view),
            }
            for one in trials
        ]
        setting = {"data": self.setting.data.name, "setting": self.setting.name, "fold": self.fold, "case": case}
        return {**setting, "domain": domain, "planted": name, "kind": mistake.kind if mistake else "", "trials": tried}


def main(argv: list[str] | None = None) -> str:
    """Run the command line and return the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with meta.json")
    parser.add_argument("--methods", type=Path, default=Path("runs/methods"), help="the folder of `methods.py`")
    parser.add_argument("--out", type=Path, default=Path("runs/preflight"), help="folder of the results")
    parser.add_argument("--folds", type=int, default=4, help="networks per direction; each holds out other patients")
    parser.add_argument("--volumes", type=int, default=7, help="random volumes per network and domain")
    parser.add_argument("--slices", type=int, default=32, help="the most slices of a volume, spread over it")
    arguments = parser.parse_args(argv)
    budget, directions = read_budget(arguments.methods), []
    save_budget(arguments.out, budget)
    for fold in range(arguments.folds):
        folder = arguments.out / f"fold-{fold}-of-{arguments.folds}"
        data = [fold_of(data, folder, fold, arguments.folds) for data in arguments.data]
        settings = all_settings(data, folder, budget)
        for forth, back in zip(settings[::2], settings[1::2], strict=True):
            for setting, other in ((forth, back), (back, forth)):
                held_out = other.read("target_val", labelled=False)
                directions.append(Direction(setting, held_out, fold, arguments.slices))
                print(f"fold {fold}, {setting.name}: network trained", file=sys.stderr, flush=True)
    rows: Rows = []
    for number in range(arguments.volumes):
        rows += [row for direction in directions for row in direction.run(number)]
        (arguments.out / "trials.json").write_text(json.dumps(rows, indent=1))
        print(f"{number + 1} of {arguments.volumes} volumes", file=sys.stderr, flush=True)
    whole = [row for direction in directions for row in direction.run_whole()]
    (arguments.out / "whole.json").write_text(json.dumps(whole, indent=1))
    text = all_tables(rows, whole)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    main()

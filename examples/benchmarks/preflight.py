"""Does preflight find planted turns, flips, inversions and wrong scales, and is it silent on another modality?

    python examples/benchmarks/preflight.py --data ABDOMEN CARDIAC

Each folder of `--data` holds the volumes of two modalities (see `examples/slices.py`) and gives two settings, one per
direction, with the plain source networks of `methods.py`, which are trained if they are missing. In each setting:

- A mistake is planted in random volumes of the source modality: of held-out patients, a random block of slices of which
  8 are taken, with small random moves and changes of intensity. It is found if the best view undoes it.
- Random volumes of the target modality are left as they are. Anything that is found there is a false alarm.

The margin of one data set is also chosen on the other one: the smallest with at most 5 % false alarms there.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bases import base_network
from settings import Budget, Setting, settings_of
from slices import Slices
from torch import Tensor
from torch.nn import functional as F

from apl_lightning.preflight import MARGIN, Trial, View, preflight

SLICES = 8  # of a volume
SHARE = 0.6  # of its slices: the shortest block
MARGINS = tuple(step / 20 for step in range(21))
FALSE_ALARMS = 0.05


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


def random_volume(data: Slices, generator: random.Random) -> Tensor:
    """Slices (8, 1, S, S) of a random block of a random patient, moved and changed in intensity by a little."""
    patient = generator.choice(sorted(set(data.cases)))
    slices = data.images[[index for index, case in enumerate(data.cases) if case == patient]]
    length = generator.randint(math.ceil(SHARE * len(slices)), len(slices))
    start = generator.randint(0, len(slices) - length)
    images = slices[torch.linspace(start, start + length - 1, min(SLICES, length)).round().long()]
    angle, zoom = math.radians(generator.uniform(-8, 8)), generator.uniform(0.95, 1.05)
    move = [generator.uniform(-0.05, 0.05) for _ in range(2)]
    rows = [[math.cos(angle), -math.sin(angle), move[0]], [math.sin(angle), math.cos(angle), move[1]]]
    theta = zoom * torch.tensor(rows).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)
    return (moved ** generator.uniform(0.85, 1.15) * generator.uniform(0.9, 1.1)).clamp(0, 1)


def trials_of(network: torch.nn.Module, images: Tensor, setting: Setting) -> list[Trial]:
    """What preflight tries on a volume."""
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.budget.precision == "bf16-mixed"):
        return list(preflight(network, list(images), num_classes=len(setting.class_names)).trials)


Rows = list[dict[str, Any]]


class Direction:
    """A source network with volumes of its modality and of the other one."""

    def __init__(self, setting: Setting, held_out: Slices, seed: int) -> None:
        self.setting = setting
        self.seed = seed
        self.network = base_network("plain", setting, seed).to(memory_format=torch.channels_last)
        self.source = held_out
        self.target = setting.read("target_adapt", labelled=False)
        self.generator = random.Random(seed)

    def run(self, number: int) -> Rows:
        """The rows of one random volume of each domain; `number` says which mistakes are planted."""
        source, target = (random_volume(data, self.generator) for data in (self.source, self.target))
        planted = {name: mistakes[number % len(mistakes)] for name, mistakes in MISTAKES.items()}
        rows = [self._row("source", "", source, None), self._row("target", "", target, None)]
        rows += [self._row("source", name, source, mistake) for name, mistake in planted.items()]
        return [*rows, self._row("target", "turn or flip", target, planted["turn or flip"])]

    def _row(self, domain: str, name: str, images: Tensor, mistake: Mistake | None) -> dict[str, Any]:
        """What was planted, and of each view its kind, its gain and whether it undoes that."""
        trials = trials_of(self.network, images if mistake is None else mistake.plant(images), self.setting)
        found = [
            {"kind": one.view.kind, "gain": one.gain, "right": mistake is not None and mistake.undone_by(one.view)}
            for one in trials
        ]
        setting = {"data": self.setting.data.name, "setting": self.setting.name, "seed": self.seed}
        return {**setting, "domain": domain, "planted": name, "kind": mistake.kind if mistake else "", "trials": found}


def share(rows: Rows, margin: float, right: bool) -> float:
    """The share of rows in which something is found; with `right`, what was planted."""
    return sum(row["gain"] > margin and (row["right"] or not right) for row in rows) / max(1, len(rows))


def chosen_margin(rows: Rows) -> float:
    """The smallest margin with at most 5 % false alarms on target images as they are."""
    clean = [row for row in rows if row["domain"] == "target" and not row["planted"]]
    return next((margin for margin in MARGINS if share(clean, margin, False) <= FALSE_ALARMS), MARGINS[-1])


def table(rows: Rows) -> str:
    """Format what is found and the false alarms: per setting, per data set with margins of its own and of another."""
    columns = ["volumes of", "margin", *(f"{name} found" for name in MISTAKES)]
    columns += ["false alarms: source", "false alarms: target", "turned target found"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    data = list(dict.fromkeys(row["data"] for row in rows))
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines.append(_line(setting, MARGIN, "", [row for row in rows if row["setting"] == setting]))
    for name in data if len(data) > 1 else ():
        of_data, others = ([row for row in rows if (row["data"] == name) == same] for same in (True, False))
        lines.append(_line(name, chosen_margin(of_data), ", chosen on these", of_data))
        lines.append(_line(name, chosen_margin(others), ", chosen on the others", of_data))
    return "\n".join([*lines, _line("all", MARGIN, ", the default", rows)])


def kinds_table(rows: Rows) -> str:
    """Format what is found of each size and range."""
    lines = ["| planted | volumes | found |", "|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] and row["domain"] == "source"):
        of_kind = [row for row in rows if row["kind"] == kind and row["domain"] == "source"]
        lines.append(f"| {kind} | {len(of_kind)} | {100 * share(of_kind, MARGIN, True):.0f} % |")
    return "\n".join(lines)


def _line(name: str, margin: float, how: str, rows: Rows) -> str:
    def cell(domain: str, planted: str) -> str:
        found = [row for row in rows if row["domain"] == domain and row["planted"] == planted]
        return f"{100 * share(found, margin, planted != ''):.0f} % of {len(found)}"

    cells = [*(cell("source", mistake) for mistake in MISTAKES), cell("source", ""), cell("target", "")]
    return f"| {name} | {margin:.2f}{how} | {' | '.join(cells)} | {cell('target', 'turn or flip')} |"


def main(argv: list[str] | None = None) -> str:
    """Run the command line and return the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with meta.json")
    parser.add_argument(
        "--methods", type=Path, default=Path("runs/methods"), help="folder of the networks of methods.py"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/preflight"), help="folder of trials.json and table.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the source networks")
    parser.add_argument("--volumes", type=int, default=25, help="random volumes per direction and domain")
    parser.add_argument("--source-steps", type=int, default=1650, help="training steps of a missing network")
    parser.add_argument("--size", type=int, default=128, help="number of rows and columns of a slice")
    arguments = parser.parse_args(argv)
    budget = Budget("monai-unet", arguments.size, 2, 1.0, arguments.source_steps, 0, 0, 0, "bf16-mixed")
    directions = []
    for data in arguments.data:
        forth, back = settings_of(data, arguments.methods, budget)
        for setting, other in ((forth, back), (back, forth)):
            held_out = other.read("target_val", labelled=False)
            directions += [Direction(setting, held_out, seed) for seed in arguments.seeds]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    for number in range(arguments.volumes):
        rows += [row for direction in directions for row in direction.run(number)]
        (arguments.out / "trials.json").write_text(json.dumps(rows, indent=1))
        print(f"{number + 1} of {arguments.volumes} volumes", file=sys.stderr, flush=True)
    text = f"{table(rows)}\n\n{kinds_table(rows)}"
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    main()

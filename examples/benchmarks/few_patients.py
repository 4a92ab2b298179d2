"""How well the estimated gain tells the true one if there are few target patients, for networks of `methods.py`.

    python examples/benchmarks/few_patients.py --data ABDOMEN CARDIAC --out runs/methods

Reads the bases and the refined networks of a folder in which `methods.py` has run. Each refined network is compared
with its base on some of the patients that are refined on, as the guard of a run on these patients alone would do. The
true gain is that of the average Dice on the same images, whose labels are read only here.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from math import isnan
from pathlib import Path
from statistics import fmean

import torch
from bases import BASES, base_network, images_for
from evaluation import organ_dice, predict
from guarded import Pair, estimate_head, estimate_row
from settings import Setting, all_settings, read_budget
from torch import Tensor, nn
from torch.utils.data import Subset

from apl_lightning.guard import Classes, PixelSample

GROUPS = 3  # of patients in a setting, at most


def patients_of(cases: list[str], count: int) -> list[list[int]]:
    """The indices of the images of `count` patients each."""
    names = list(dict.fromkeys(cases))
    starts = range(0, len(names) - count + 1, max(count, len(names) // GROUPS))
    groups = [set(names[start : start + count]) for start in starts[:GROUPS]]
    return [[index for index, case in enumerate(cases) if case in group] for group in groups]


def look(sample: PixelSample, images: Subset, labels: list[Tensor]) -> Classes:
    """The predicted classes at the sampled pixels."""
    samples = [images[index] for index in range(len(images))]
    stacked = torch.stack([of_image["image"] for of_image in samples])
    return sample.look(range(len(images)), [of_image["case"] for of_image in samples], stacked, torch.stack(labels))


def refined(setting: Setting, base: str, seed: int) -> Iterator[nn.Module]:
    """The networks that the runs from a base have ended with."""
    for path in sorted((setting.out / "runs").glob(f"{base}--*--{seed}.pt")):
        network = base_network(base, setting, seed)
        network.load_state_dict(torch.load(path, weights_only=True))
        yield network


def pairs(setting: Setting, base: str, seed: int, counts: list[int]) -> Iterator[tuple[int, Pair]]:
    """The number of patients, and estimated and true gain on them in points."""
    network = base_network(base, setting, seed)
    images, names = images_for(network, setting, "target_adapt"), setting.class_names
    groups = [(count, Subset(images, part)) for count in counts for part in patients_of(images.cases, count)]
    samples = [PixelSample(len(part)) for _, part in groups]

    def seen(network: nn.Module) -> list[tuple[Classes, float]]:
        labels = predict(network, images)
        found = []
        for sample, (_, part) in zip(samples, groups, strict=True):
            of_part = [labels[index] for index in part.indices]
            found.append((look(sample, part, of_part), organ_dice(of_part, part, names)["average"]))
        return found

    before = seen(network)
    for other in refined(setting, base, seed):
        for (count, _), sample, (first, dice), (last, later) in zip(groups, samples, before, seen(other), strict=True):
            gains = [gain for gain in sample.gains(first, last, len(names)) if not isnan(gain)]
            yield count, (100 * fmean(gains or [0.0]), later - dice)


def main(argv: list[str] | None = None) -> dict[int, list[Pair]]:
    """Run the command line and return the pairs by the number of patients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with meta.json")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="the folder of `methods.py`")
    parser.add_argument("--bases", choices=BASES, nargs="+", default=["plain", "remapped"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--patients", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args(argv)
    found: dict[int, list[Pair]] = {count: [] for count in arguments.patients}
    settings = all_settings(arguments.data, arguments.out, read_budget(arguments.out))
    for setting, base, seed in product(settings, arguments.bases, arguments.seeds):
        for count, pair in pairs(setting, base, seed, arguments.patients):
            found[count].append(pair)
    print(estimate_head("patients"))
    for count, of_count in found.items():
        print(estimate_row(str(count), of_count), flush=True)
    return found


if __name__ == "__main__":
    main()

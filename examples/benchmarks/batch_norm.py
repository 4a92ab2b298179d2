"""Compare the choice of BatchNorm statistics that needs no labels with the better one, for bases of `methods.py`.

    python examples/benchmarks/batch_norm.py --data ABDOMEN CARDIAC --out runs/methods

Reads the bases and the budget of a folder in which `methods.py` has run; the bases must have BatchNorm. Dice in %, on
the images that are refined (their labels are read only here) and on held-out patients, before any refinement. *Below
the better*: how much the chosen statistics lose against the better ones.
"""

import argparse
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
from bases import BASES, base_network, images_for
from evaluation import organ_dice, predict
from markdown_table import table_head, table_row
from settings import Setting, all_settings, read_budget, trainer
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.refinement.batchnorm import BatchNormMode

COLUMNS = (
    "setting",
    "base",
    "seed",
    "refined: source",
    "re-estimated",
    "chosen",
    "held out: source",
    "re-estimated",
    "chosen",
    "estimate",
    "below the better: refined",
    "held out",
)


def prepared(network: nn.Module, setting: Setting, batch_norm: BatchNormMode) -> tuple[nn.Module, dict[str, float]]:
    """The network with the statistics that a run on unlabelled images gives it, and what the run logs."""
    pl.seed_everything(0, workers=True, verbose=False)
    labels, names = PseudoLabelCallback(guard="off"), setting.class_names
    module = APLModule(network, len(names), names, batch_norm=batch_norm, learning_rate=0.0)
    with TemporaryDirectory() as folder:
        data = TargetDataModule(images_for(network, setting, "target_adapt"), store_dir=folder)
        trainer(setting.budget, max_steps=1, callbacks=[labels]).fit(module, data)
    return module.export(), labels.statistics


def row(setting: Setting, base: str, seed: int) -> list[str]:
    """One line of the table."""
    network = base_network(base, setting, seed)
    refined, held_out = (images_for(network, setting, split) for split in ("target_adapt", "target_val"))
    chosen, found = prepared(network, setting, "auto")
    networks = (network, prepared(network, setting, "adapt")[0], chosen)
    dice = [
        [organ_dice(predict(network, images), images, setting.class_names)["average"] for network in networks]
        for images in (refined, held_out)
    ]
    figures = [f"{value:.1f}" for value in (*dice[0], *dice[1], 100 * found["pseudo/batch_norm_gain"])]
    below = [f"{round(max(source, other) - of_chosen, 1) + 0.0:.1f}" for source, other, of_chosen in dice]  # no -0.0
    return [setting.name, base, str(seed), *figures, *below]


def main(argv: list[str] | None = None) -> list[list[str]]:
    """Run the command line and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with meta.json")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="the folder of `methods.py`")
    parser.add_argument("--bases", choices=BASES, nargs="+", default=["plain", "remapped"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args(argv)
    budget = read_budget(arguments.out)
    settings = all_settings(arguments.data, arguments.out, budget)
    rows = []
    print(table_head(*COLUMNS))
    for setting, base, seed in product(settings, arguments.bases, arguments.seeds):
        rows.append(row(setting, base, seed))
        print(table_row(*rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()

"""The main job on real images: a network trained on MR gets better on unlabelled CT.

    python examples/abdomen.py --data DIR

For each seed: train on labelled MR (with random intensity remapping), measure on CT, re-estimate BatchNorm and
refine on unlabelled CT, measure again, both on patients that refinement never saw. Writes a panel a seed,
`results-PRESET.json` and `table-PRESET.md`. Source networks are kept in the output folder and used again.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytorch_lightning as pl
import torch
from abdomen_data import CLASS_NAMES, AbdomenSlices
from evaluation import organ_dice, predict, table
from networks import NETWORKS, build_network
from panel import save_panel
from source_training import SourceModule
from torch import nn
from torch.utils.data import DataLoader

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.presets import PAPER, Preset
from apl_lightning.visualize import PseudoLabelOverlay

PRESETS = {"default": Preset({}, {}, {}), "paper": PAPER}


def make_trainer(epochs: int, folder: Path, callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
    """A trainer on one device that logs to a CSV file in `folder`."""
    return pl.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=pl.loggers.CSVLogger(folder),
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def source_network(arguments: argparse.Namespace, seed: int) -> nn.Module:
    """Train on MR, or take the network that an earlier call with the same options has trained."""
    network = build_network(arguments.network, len(CLASS_NAMES))
    name = f"source-{arguments.network}-{arguments.size}-{arguments.source_epochs}-{arguments.fraction}-{seed}.pt"
    path = arguments.out / name
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    data = AbdomenSlices(arguments.data, "source_train", arguments.size, fraction=arguments.fraction)
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    make_trainer(arguments.source_epochs, arguments.out / f"source-{seed}").fit(SourceModule(network), loader)
    torch.save(network.state_dict(), path)
    return network


def run(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """One seed: the Dice on `target_val` of the source network and of the refined one."""
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.jobs))
    pl.seed_everything(seed, workers=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = source_network(arguments, seed)
    read = partial(AbdomenSlices, arguments.data, size=arguments.size, fraction=arguments.fraction)
    held_out = read("target_val")

    pl.seed_everything(seed, workers=True)
    preset = PRESETS[arguments.preset]
    module = APLModule(source, len(CLASS_NAMES), CLASS_NAMES, **preset.module)
    data = TargetDataModule(read("target_adapt", labelled=False), **preset.data)
    callbacks = [PseudoLabelCallback(**preset.callback), PseudoLabelOverlay()]
    make_trainer(arguments.epochs, arguments.out / f"refined-{seed}", callbacks).fit(module, data)
    refined = module.export()
    torch.save(refined.state_dict(), arguments.out / f"refined-{arguments.preset}-{seed}.pt")

    predictions = {"before": predict(source, held_out), "after": predict(refined, held_out)}
    rows = [(2 * part + 1) * len(held_out) // 8 for part in range(4)]
    save_panel(
        arguments.out / f"panel-{arguments.preset}-{seed}.png",
        [held_out[row]["image"] for row in rows],
        {
            **{name: [labels[row] for row in rows] for name, labels in predictions.items()},
            "reference": [held_out[row]["label"] for row in rows],
        },
    )
    return {name: organ_dice(labels, held_out, CLASS_NAMES) for name, labels in predictions.items()}


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run the command line; returns the Dice before, after and gained, one entry a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json, mr/ and ct/")
    parser.add_argument("--out", type=Path, default=Path("runs/abdomen"))
    parser.add_argument("--network", choices=NETWORKS, default="monai-unet")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a slice")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4, help="epochs of refinement")
    parser.add_argument("--source-epochs", type=int, default=60)
    parser.add_argument("--fraction", type=float, default=1.0, help="part of the patients, for a smoke test")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    arguments = parser.parse_args(argv)

    if arguments.jobs > 1:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(partial(run, arguments), arguments.seeds))
    else:
        results = [run(arguments, seed) for seed in arguments.seeds]
    rows = {name: [result[name] for result in results] for name in ("before", "after")}
    rows["gain"] = [{c: result["after"][c] - result["before"][c] for c in result["after"]} for result in results]
    (arguments.out / f"results-{arguments.preset}.json").write_text(json.dumps(rows, indent=1))
    (arguments.out / f"table-{arguments.preset}.md").write_text(table(rows) + "\n")
    print(f"\nDice (%) on unseen CT patients, {len(results)} seed(s):\n\n{table(rows)}")
    return rows


if __name__ == "__main__":
    main()

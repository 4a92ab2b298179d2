"""Quick start: train a network on MR-like images, refine it on unlabelled CT-like images, compare the Dice.

    python examples/quickstart.py

Runs in about three minutes on a CPU and downloads nothing: the abdomens are drawn. Prints the Dice on held-out CT
patients before and after refinement and writes a figure with both predictions.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
from evaluation import organ_dice, predict, table
from monai.networks.nets import UNet
from panel import save_panel
from phantom import CLASS_NAMES, Phantoms
from source_training import SourceModule
from torch.utils.data import DataLoader

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run the command line; returns the Dice before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--patients", type=int, default=200, help="number of patients per modality")
    parser.add_argument("--source-epochs", type=int, default=14)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    pl.seed_everything(arguments.seed, workers=True)
    options = {
        "default_root_dir": arguments.out,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }

    print("1. Train a network on labelled MR images ...")
    network = UNet(2, 1, len(CLASS_NAMES), channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="batch")
    source = DataLoader(Phantoms("mr", arguments.patients, seed=1), batch_size=8, shuffle=True, drop_last=True)
    pl.Trainer(max_epochs=arguments.source_epochs, **options).fit(SourceModule(network), source)

    print("2. Refine it on unlabelled CT images ...")
    module = APLModule(network, len(CLASS_NAMES), CLASS_NAMES, learning_rate=2e-4)
    data = TargetDataModule(Phantoms("ct", arguments.patients, seed=2, labelled=False), batch_size=4)
    pl.Trainer(max_epochs=arguments.epochs, callbacks=[PseudoLabelCallback()], **options).fit(module, data)
    refined = module.export()

    unseen = Phantoms("ct", 40, seed=3)
    predictions = {"before": predict(network, unseen), "after": predict(refined, unseen)}
    rows = {name: [organ_dice(labels, unseen, CLASS_NAMES)] for name, labels in predictions.items()}
    print(f"\nDice (%) on 40 held-out CT patients:\n\n{table(rows)}")
    save_panel(
        arguments.out / "panel.png",
        [unseen[index]["image"] for index in range(3)],
        {name: labels[:3] for name, labels in predictions.items()}
        | {"reference": [unseen[index]["label"] for index in range(3)]},
    )
    print(f"\nFigure: {arguments.out / 'panel.png'}")
    return rows


if __name__ == "__main__":
    main()

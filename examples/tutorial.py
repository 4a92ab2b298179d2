"""The tutorial of the documentation: refine a network, inspect its labels, watch the guard, use the result.

    python examples/tutorial.py --out docs/tutorial

Draws abdomens as MR-like and CT-like images, so it needs no download. Takes about two minutes on one CPU core. Writes
the pictures and tables that `docs/tutorial.md` shows; the page also shows the marked sections of this file.
"""

import argparse
import csv
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from evaluation import organ_dice, predict, table
from monai.networks.nets import UNet
from panel import save_panel
from phantom import CLASS_NAMES, Phantoms
from pytorch_lightning.loggers import CSVLogger
from source_training import SourceModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.visualize import overlay

OPTIONS: dict[str, Any] = {"accelerator": "cpu", "enable_checkpointing": False, "enable_model_summary": False}


# --8<-- [start:network]
def build_network() -> nn.Module:
    """A small 2D U-Net with five output channels."""
    return UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=len(CLASS_NAMES),
        channels=(16, 32, 64, 128),
        strides=(2, 2, 2),
        num_res_units=2,
        norm="batch",
    )


def train_on_source(patients: int, epochs: int) -> nn.Module:
    """Train a network on labelled MR images."""
    network = build_network()
    images = Phantoms("mr", patients, seed=1)
    loader = DataLoader(images, batch_size=8, shuffle=True, drop_last=True)
    trainer = pl.Trainer(max_epochs=epochs, logger=False, **OPTIONS)
    trainer.fit(SourceModule(network), loader)
    return network
    # --8<-- [end:network]


# --8<-- [start:refine]
def refine(
    network: nn.Module,
    patients: int,
    epochs: int,
    folder: Path,
    learning_rate: float = 2e-4,
    guard: str = "restore",
) -> tuple[APLModule, TargetDataModule]:
    """Refine a copy of the network on unlabelled CT images."""
    module = APLModule(
        network,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        learning_rate=learning_rate,
    )
    data = TargetDataModule(
        train=Phantoms("ct", patients, seed=2, labelled=False),
        test=Phantoms("ct", 40, seed=3),
        predict=Phantoms("ct", 40, seed=3, labelled=False),
        batch_size=4,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[PseudoLabelCallback(guard=guard)],
        logger=CSVLogger(folder),
        default_root_dir=folder,  # pseudo labels are stored here
        **OPTIONS,
    )
    trainer.fit(module, data)
    return module, data
    # --8<-- [end:refine]


# --8<-- [start:labels]
def save_labels(path: Path, data: TargetDataModule) -> None:
    """Draw three images with the pseudo label and the weight of the last round."""
    dataset = data.train_dataset
    figure, axes = plt.subplots(3, 3, figsize=(7.2, 7.5))
    for index, row in enumerate(axes):
        image = dataset.read(index)["image"]
        label = dataset.store.read(index)
        row[0].imshow(image[0].numpy(), cmap="gray")
        row[1].imshow(overlay(image, label.labels))
        row[2].imshow(label.weights.numpy(), cmap="gray", vmin=0, vmax=1)
    # --8<-- [end:labels]
    for axis, title in zip(axes[0], ["target image", "pseudo label", "weight"], strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    finish(figure, path)


# --8<-- [start:guard]
def refine_too_fast(
    network: nn.Module,
    patients: int,
    epochs: int,
    folder: Path,
) -> APLModule:
    """Refine with a learning rate that makes the network collapse; the guard returns to a better one."""
    module, _ = refine(
        network,
        patients,
        epochs,
        folder,
        learning_rate=5e-3,
    )
    return module
    # --8<-- [end:guard]


# --8<-- [start:use]
def measure(module: APLModule, data: TargetDataModule) -> list[Tensor]:
    """Print the Dice and return the label map of each image."""
    trainer = pl.Trainer(logger=False, **OPTIONS)
    trainer.test(module, data)  # test/dice and test/dice/<class>
    return list(torch.cat(trainer.predict(module, data)))


def export(module: APLModule, path: Path) -> nn.Module:
    """Save the plain network, and load it without apl-lightning."""
    torch.save(module.export().state_dict(), path)
    refined = build_network()
    refined.load_state_dict(torch.load(path, weights_only=True))
    return refined
    # --8<-- [end:use]


def save_scores(path: Path, logs: dict[str, Path]) -> None:
    """Plot the estimated gain and the share of one organ in the labels, by round, for each run."""
    titles = {"pseudo/estimated_gain": "estimated gain of Dice", "pseudo/class_ratio/spleen": "share of the spleen"}
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for run, log in logs.items():
            values = read_log(log, name)
            axis.plot(values, marker="o", label=run)
        axis.axhline(0, color="gray", linestyle="--")
        axis.set(title=title, xlabel="round", xticks=range(len(values)))
    axes[1].legend()
    finish(figure, path)


def read_log(folder: Path, name: str) -> list[float]:
    """Read a logged metric of each round from the CSV log of a run."""
    (path,) = folder.rglob("metrics.csv")
    return [float(row[name]) for row in csv.DictReader(path.read_text().splitlines()) if row.get(name)]


def finish(figure: plt.Figure, path: Path) -> None:
    """Save and close a figure."""
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def guard_messages(caught: Iterable[warnings.WarningMessage]) -> str:
    """The warning of the guard."""
    messages = [str(warning.message) for warning in caught]
    return "\n\n".join(textwrap.fill(message, 76) for message in messages if "guard='" in message)


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run the command line; returns the Dice of the three networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tutorial"))
    parser.add_argument("--patients", type=int, default=200, help="number of patients per modality")
    parser.add_argument("--source-epochs", type=int, default=14)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    pl.seed_everything(arguments.seed, workers=True)
    arguments.out.mkdir(parents=True, exist_ok=True)

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        network = train_on_source(arguments.patients, arguments.source_epochs)
        module, data = refine(network, arguments.patients, arguments.epochs, folder / "refined")
        save_labels(arguments.out / "labels.png", data)
        labels = measure(module, data)
        refined = export(module, folder / "refined.pt")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = refine_too_fast(network, arguments.patients // 2, arguments.epochs, folder / "collapsed")
        (arguments.out / "guard.txt").write_text(guard_messages(caught) + "\n")
        runs = {"learning rate 2e-4": folder / "refined", "learning rate 5e-3": folder / "collapsed"}
        save_scores(arguments.out / "guard.png", runs)

    unseen = Phantoms("ct", 40, seed=3)
    predictions = {
        "source network": predict(network, unseen),
        "refined": predict(refined, unseen),
        "learning rate too high, restored": predict(restored.export(), unseen),
    }
    rows = {name: [organ_dice(maps, unseen, CLASS_NAMES)] for name, maps in predictions.items()}
    print(f"\nDice (%) on 40 held-out CT patients:\n\n{table(rows)}")
    (arguments.out / "dice.txt").write_text(table(rows) + "\n")
    before, after = (rows[name][0]["average"] for name in ("source network", "refined"))
    save_panel(
        arguments.out / "dice.png",
        [unseen[index]["image"] for index in range(3)],
        {
            f"before {before:.1f}": predictions["source network"][:3],
            f"after {after:.1f}": labels[:3],
            "reference": [unseen[index]["label"] for index in range(3)],
        },
    )
    return rows


if __name__ == "__main__":
    main()

"""The main experiment on real images: refine a network trained on MR with unlabelled CT.

    python examples/abdomen.py --data DIR

For each seed: train on labelled MR with random intensity remapping, refine on unlabelled CT, and evaluate both networks
on held-out CT patients. `--report target_test` evaluates on the blind patients of `prepare_abdomen.py`. Writes a figure
per seed, `results-PRESET-REPORT.json` and `table-PRESET-REPORT.md`. Networks are saved in the output folder and reused.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import pytorch_lightning as pl
import torch
from evaluation import organ_dice, patient_dice, predict, write_results
from networks import NETWORKS, build_network, save_weights
from panel import fullest_slice, save_panel
from slices import Slices, class_names
from source_training import SourceModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apl_lightning import APLModule, PseudoLabelCallback, PseudoLabelOverlay, TargetDataModule
from apl_lightning.presets import PAPER, Preset

PRESETS = {"default": Preset({}, {}, {}), "paper": PAPER}


def make_trainer(folder: Path, callbacks: list[pl.Callback] | None = None, **length: int) -> pl.Trainer:
    """Create a trainer on one device that logs to a CSV file in `folder`; `length` is in epochs or steps."""
    return pl.Trainer(
        **length,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=pl.loggers.CSVLogger(folder),
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def source_network(arguments: argparse.Namespace, seed: int) -> nn.Module:
    """Train on MR, or load the network that an earlier run with the same options saved."""
    network = build_network(arguments.network, len(class_names(arguments.data)))
    path = arguments.out / f"source-{_options(arguments)}-{seed}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    data = Slices(arguments.data, "source_train", arguments.size, fraction=arguments.fraction)
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    trainer = make_trainer(arguments.out / f"source-{seed}", max_epochs=arguments.source_epochs)
    trainer.fit(SourceModule(network), loader)
    save_weights(network.state_dict(), path)
    return network


def refined_network(arguments: argparse.Namespace, seed: int, source: nn.Module) -> nn.Module:
    """Refine the source network on unlabelled CT, or load the network of an earlier run with the same options."""
    path = arguments.out / f"refined-{arguments.preset}-{arguments.epochs}-{_options(arguments)}-{seed}.pt"
    if path.exists():
        network = build_network(arguments.network, len(class_names(arguments.data)))
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    pl.seed_everything(seed, workers=True)
    preset = PRESETS[arguments.preset]
    names = class_names(arguments.data)
    module = APLModule(source, len(names), names, **preset.module)
    images = Slices(arguments.data, "target_adapt", arguments.size, labelled=False, fraction=arguments.fraction)
    data = TargetDataModule(images, **preset.data)
    callbacks = [PseudoLabelCallback(**preset.callback), PseudoLabelOverlay()]
    make_trainer(arguments.out / f"refined-{seed}", callbacks, max_epochs=arguments.epochs).fit(module, data)
    refined = module.export()
    save_weights(refined.state_dict(), path)
    return refined


def run(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Run one seed and return the Dice of the source network and of the refined network on the reported patients."""
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    held_out = Slices(arguments.data, arguments.report, arguments.size, fraction=arguments.fraction)
    pl.seed_everything(seed, workers=True)
    source = source_network(arguments, seed)
    refined = refined_network(arguments, seed, source)
    predictions = {"before": predict(source, held_out), "after": predict(refined, held_out)}
    save_picture(arguments.out / f"picture-{arguments.preset}-{arguments.report}-{seed}.png", predictions, held_out)
    return {name: organ_dice(labels, held_out, held_out.class_names) for name, labels in predictions.items()}


def save_picture(path: Path, predictions: dict[str, list[Tensor]], held_out: Slices) -> None:
    """Draw a slice of the patient whose gain is closest to the mean gain; the titles show the Dice of the whole volume.

    The slice is the one in which the smallest organ has most pixels.
    """
    names = held_out.class_names
    dice = {
        name: {patient: mean(organs.values()) for patient, organs in patient_dice(labels, held_out, names).items()}
        for name, labels in predictions.items()
    }
    gains = {patient: dice["after"][patient] - before for patient, before in dice["before"].items()}
    typical = mean(gains.values())
    patient = min(gains, key=lambda patient: abs(gains[patient] - typical))
    shown = fullest_slice(held_out, patient)
    columns = {f"{name}: Dice {dice[name][patient]:.1f}": [labels[shown]] for name, labels in predictions.items()}
    save_panel(path, [held_out[shown]["image"]], {**columns, "reference": [held_out[shown]["label"]]})


def _options(arguments: argparse.Namespace) -> str:
    return f"{arguments.network}-{arguments.size}-{arguments.source_epochs}-{arguments.fraction}"


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run the command line and return the Dice before and after and the gain, one entry per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json, mr/ and ct/")
    parser.add_argument("--out", type=Path, default=Path("runs/abdomen"))
    parser.add_argument("--network", choices=NETWORKS, default="monai-unet")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--report", default="target_val", help="patients to evaluate on: target_val or target_test")
    parser.add_argument("--size", type=int, default=128, help="number of rows and columns of a slice")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4, help="epochs of refinement")
    parser.add_argument("--source-epochs", type=int, default=60)
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the patients, for a smoke test")
    parser.add_argument("--jobs", type=int, default=1, help="number of seeds that run in parallel")
    arguments = parser.parse_args(argv)
    arguments.threads = max(1, torch.get_num_threads() // arguments.jobs)

    if arguments.jobs > 1:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(partial(run, arguments), arguments.seeds))
    else:
        results = [run(arguments, seed) for seed in arguments.seeds]
    return write_results(arguments.out, f"{arguments.preset}-{arguments.report}", results)


if __name__ == "__main__":
    main()

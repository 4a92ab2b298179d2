"""Adapt a network to unlabelled target images with one of the seven systems of the paper's table, and save it.

    python examples/uda/adapt.py synseg --data DIR --out FOLDER

Adaptation, before refinement, needs the source data. The files have the keys of each system's official code (SIFA: of
its PyTorch port), and `apl_lightning.checkpoints.load` reads them; for SynSeg-Net pass `tanh=False`. No target label
trains anything, and the number of steps is fixed. CyCADA needs the generator that `cyclegan` has saved in the same
folder. `SIZES` has the official networks and smaller ones for a CPU; docs/table.md lists what differs from the official
training.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adaptsegnet import AdaptSegNetModule
from advent import AdventModule
from cycada import CyCADAModule
from cyclegan import CycleGANModule
from evaluation import logits_of
from networks import save_weights
from sifa_v1 import SIFAv1Module
from sifa_v2 import SIFAv2Module
from slices import Slices, class_names
from source_training import SourceModule, moved
from synseg import SynSegModule

from apl_lightning.checkpoints import DRN, SIFA, DeepLabV2, ResnetGenerator, SIFAGenerator, load

# The file of each system's target network; of CycleGAN, of the generator from target to source images.
FILES = {
    "synseg": "latest_net_Seg_A.pth",
    "adaptsegnet": "adaptsegnet.pth",
    "cyclegan": "latest_net_G_B.pth",
    "cycada": "cycada.pth",
    "advent": "advent.pth",
    "sifa-v1": "sifa-v1.pth",
    "sifa-v2": "sifa-v2.pth",
}
Trainers = Callable[[], pl.Trainer]
TO_TARGET = "latest_net_G_A.pth"  # CycleGAN's other generator
DRN26 = (1, 1, 2, 2, 2, 2, 1, 1)


class Size(NamedTuple):
    """Widths of first layers, numbers of blocks, and steps.

    The segmentation networks learn the source labels for `source_steps` first, in place of pretrained weights.
    """

    generator: tuple[int, int]  # width and blocks, of SynSeg-Net's segmenter too
    discriminator: int
    deeplab: tuple[int, tuple[int, ...]]
    drn: int
    sifa: int
    sifa_generator: int
    source_steps: dict[str, int]
    steps: dict[str, int]


BATCH_SIZES = {"synseg": 1, "cyclegan": 1, "cycada": 4, "sifa-v1": 4, "sifa-v2": 4, "adaptsegnet": 8, "advent": 8}
SIZES = {
    "smoke test": Size((4, 6), 2, (2, (1, 1, 1, 1)), 2, 1, 2, dict.fromkeys(FILES, 1), dict.fromkeys(FILES, 2)),
    "small": Size(
        generator=(16, 6),
        discriminator=16,
        deeplab=(16, (2, 2, 4, 2)),
        drn=8,
        sifa=4,
        sifa_generator=8,
        source_steps={**dict.fromkeys(FILES, 1000), "cycada": 600, "synseg": 400},
        steps={
            "synseg": 1500,
            "adaptsegnet": 1000,
            "cyclegan": 2500,
            "cycada": 700,
            "advent": 1000,
            "sifa-v1": 600,
            "sifa-v2": 600,
        },
    ),
    "official": Size(
        generator=(64, 9),
        discriminator=64,
        deeplab=(64, (3, 4, 23, 3)),
        drn=16,
        sifa=16,
        sifa_generator=32,
        source_steps=dict.fromkeys(FILES, 10_000),
        steps={**dict.fromkeys(FILES, 20_000), "synseg": 60_000, "cyclegan": 60_000},
    ),
}


def build(system: str, size: Size, classes: int, folder: Path) -> pl.LightningModule:
    """The untrained module of a system."""
    width = size.discriminator
    match system:
        case "cyclegan" | "synseg":
            generators = [ResnetGenerator(1, 1, *size.generator) for _ in ("to target", "to source")]
            if system == "cyclegan":
                return CycleGANModule(*generators, width)
            return SynSegModule(*generators, ResnetGenerator(1, classes, *size.generator, tanh=False), width)
        case "adaptsegnet" | "advent":
            kind, branches = (AdaptSegNetModule, 2) if system == "adaptsegnet" else (AdventModule, 4)
            network = DeepLabV2(classes, branches, ("layer5", "layer6"), *size.deeplab)
            # The affine parameters of BatchNorm are fixed in pretrained networks, and this one is not pretrained.
            return kind(network.requires_grad_(True), classes, width)
        case "cycada":
            if not (folder / TO_TARGET).exists():
                raise FileNotFoundError(f"Expected {folder / TO_TARGET}, but there is none: run `cyclegan` first.")
            network = DRN(classes, DRN26, size.drn)
            return CyCADAModule(network, load("cyclegan", folder / TO_TARGET), classes, 8 * width)
        case "sifa-v1":
            segmenter = SIFA(classes, in_channels=3, width=size.sifa)
            return SIFAv1Module(segmenter, SIFAGenerator(3, width=size.sifa_generator), classes, width)
        case "sifa-v2":
            segmenter = SIFA(classes, lower=True, width=size.sifa)
            return SIFAv2Module(segmenter, SIFAGenerator(1, width=size.sifa_generator), classes, width)
    raise ValueError(f"Expected `system` to be one of {list(FILES)}, but got {system!r}.")


class SourceStart(SourceModule):
    """Training of the segmentation network of a system on labelled source images alone, with all its classifiers."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.network if hasattr(module, "network") else module.segmenter)
        self.prepared = isinstance(module, SIFAv1Module)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        image, label = moved(batch["image"], batch["label"])
        image = image if self.prepared else self.model.preprocess(image.clamp(0, 1))
        levels = logits_of(self.model, image)
        return torch.stack([self.criterion(logits, label[:, None]) for logits in levels]).mean()


def state_dicts(system: str, module: Any) -> dict[str, Mapping[str, Tensor]]:
    """The state dicts that a system saves, by the name of the file; the one that counts as finished is the last."""
    match system:
        case "cyclegan":
            return {TO_TARGET: module.to_target.state_dict(), FILES[system]: module.to_source.state_dict()}
        case "synseg":
            return {FILES[system]: module.segmenter.state_dict()}
        case "sifa-v1" | "sifa-v2":
            generator = {f"g_A.{name}": tensor for name, tensor in module.generator.state_dict().items()}
            return {FILES[system]: {**module.segmenter.state_dict(), **generator}}
    return {FILES[system]: module.network.state_dict()}


def load_adapted(system: str, folder: Path, classes: int) -> nn.Module:
    """The target network of a system; of CycleGAN, the generator from target to source images."""
    return load(system, folder / FILES[system], classes, **({"tanh": False} if system == "synseg" else {}))


def prepared(images: Slices, network: nn.Module) -> Slices:
    """The images as the network needs them: all slices of each patient are preprocessed together."""
    cases = dict.fromkeys(images.cases)
    parts = [images.images[[number for number, of in enumerate(images.cases) if of == case]] for case in cases]
    result = copy.copy(images)
    result.images = torch.cat([network.preprocess(part) for part in parts])  # type: ignore[operator]
    return result


def adapt(
    system: str, source: Slices, target: Slices, size: Size, folder: Path, trainer: Trainers, classes: int
) -> None:
    """Train a system on labelled source and unlabelled target images and save its networks.

    `trainer` makes a trainer of one epoch; the batches of the epoch are the steps.
    """
    module = build(system, size, classes, folder)
    if isinstance(module, SIFAv1Module):  # z-scores of whole volumes
        source, target = prepared(source, module.generator), prepared(target, module.segmenter)
    if system != "cyclegan":
        trainer().fit(SourceStart(module), _loader(source, size.source_steps[system], 8))
    batches = {
        name: _loader(dataset, size.steps[system], BATCH_SIZES[system])
        for name, dataset in (("source", source), ("target", target))
    }
    trainer().fit(module, pl.utilities.CombinedLoader(batches, "min_size"))
    for name, state in state_dicts(system, module).items():
        save_weights(state, folder / name)


def _loader(dataset: Dataset[Any], steps: int, batch_size: int) -> DataLoader[Any]:
    sampler = RandomSampler(dataset, num_samples=steps * batch_size)  # type: ignore[arg-type] # it has a length
    return DataLoader(dataset, batch_size, sampler=sampler)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=FILES)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json, mr/ and ct/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--networks", choices=SIZES, default="official" if torch.cuda.is_available() else "small")
    parser.add_argument("--size", type=int, default=256 if torch.cuda.is_available() else 128, help="rows and columns")
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the patients, for a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    pl.seed_everything(arguments.seed, workers=True)
    source, target = (
        Slices(arguments.data, split, arguments.size, labelled, arguments.fraction)
        for split, labelled in (("source_train", True), ("target_adapt", False))
    )
    trainer = partial(
        pl.Trainer, max_epochs=1, devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    classes = len(class_names(arguments.data))
    adapt(arguments.system, source, target, SIZES[arguments.networks], arguments.out, trainer, classes)


if __name__ == "__main__":
    main()

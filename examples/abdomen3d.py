"""The main experiment in 3D: refine a network trained on patches of MR volumes with unlabelled CT volumes.

    python examples/abdomen3d.py --data DIR

For each seed: train on patches of labelled MR with random intensity remapping, refine on patches of unlabelled CT, and
evaluate both networks on whole held-out CT volumes by a sliding window. Volumes have slices of 5 mm and differ in their
number. Writes results and a table. Networks are saved in the output folder and reused.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from abdomen import make_trainer
from evaluation import organ_dice, write_results
from monai.data import CacheDataset, DataLoader
from monai.networks.nets import UNet
from monai.transforms import Compose, RandCropByPosNegLabeld, SpatialPadd
from networks import save_weights
from slices import class_names, read_meta
from source_training import SourceModule
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.data import sliding_window

SLICE = 5.0  # mm
BATCH = 2


def read_volume(path: Path, spacing: float, size: int) -> tuple[Tensor, Tensor]:
    """An image (1, slices, size, size) in [0, 1], scaled by percentiles, and its label (slices, size, size)."""
    with np.load(path) as arrays:
        image, label = (torch.from_numpy(arrays[key].astype(np.float32)) for key in ("image", "label"))
    low, high = np.percentile(image.numpy(), [1, 99.5])
    shape = (max(1, round(len(image) * spacing / SLICE)), size, size)
    image = ((image - low) / (high - low)).clamp(0, 1)
    image = F.interpolate(image[None, None], shape, mode="trilinear", align_corners=False)[0]
    return image, F.interpolate(label[None, None], shape, mode="nearest-exact")[0, 0].long()


def read_volumes(root: Path, split: str, size: int, fraction: float, labelled: bool = True) -> list[dict[str, Any]]:
    """The volumes of a split as dictionaries with `image`, `case` and, if labelled, `label`."""
    meta = read_meta(root)
    cases = {case["id"]: case for case in meta["cases"]}
    patients = meta["split"][split]
    volumes = []
    for patient in patients[: max(1, round(fraction * len(patients)))]:
        case = cases[patient]
        image, label = read_volume(Path(root) / case["file"], case["spacing_zyx_mm"][0], size)
        volumes.append({"image": image, "case": patient, **({"label": label} if labelled else {})})
    return volumes


def build_network(classes: int) -> nn.Module:
    """A small 3D network with BatchNorm."""
    return UNet(3, 1, classes, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=1, norm="batch")


def source_network(arguments: argparse.Namespace, seed: int) -> nn.Module:
    """Train on patches of MR volumes, or load the network that an earlier run with the same options saved."""
    network = build_network(len(class_names(arguments.data)))
    path = arguments.out / f"source-{_source_options(arguments)}-{seed}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    volumes = read_volumes(arguments.data, "source_train", arguments.size, arguments.fraction)
    for volume in volumes:
        volume["label"] = volume["label"][None]
    keys = ("image", "label")
    patches = Compose(
        [
            SpatialPadd(keys, arguments.patch_size),
            RandCropByPosNegLabeld(keys, "label", arguments.patch_size, num_samples=4),
        ]
    )
    data = CacheDataset([volume for volume in volumes for _ in range(4)], patches, progress=False)
    loader = DataLoader(data, batch_size=1, shuffle=True)
    trainer = make_trainer(arguments.out / f"source-{seed}", max_steps=arguments.source_steps, max_epochs=-1)
    trainer.fit(SourceOnVolumes(network), loader)
    save_weights(network.state_dict(), path)
    return network


class SourceOnVolumes(SourceModule):
    """Supervised training on volumes, whose labels have a channel."""

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        image, label = (batch[key].as_tensor() for key in ("image", "label"))  # of MONAI's MetaTensor
        return super().training_step({"image": image, "label": label[:, 0]})


def refined_network(arguments: argparse.Namespace, seed: int, source: nn.Module) -> nn.Module:
    """Refine the source network on patches of unlabelled CT volumes, or load the network of an earlier run."""
    path = arguments.out / f"refined-{_options(arguments)}-{seed}.pt"
    if path.exists():
        network = build_network(len(class_names(arguments.data)))
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    pl.seed_everything(seed, workers=True)
    names = class_names(arguments.data)
    volumes = read_volumes(arguments.data, "target_adapt", arguments.size, arguments.fraction, labelled=False)
    data = TargetDataModule(
        CacheDataset(volumes, progress=False),
        batch_size=BATCH,
        patch_size=arguments.patch_size,
        patches_per_volume=2,
        steps_per_epoch=arguments.round_steps,
    )
    module = APLModule(source, len(names), names)
    folder, callbacks = arguments.out / f"refined-{seed}", [PseudoLabelCallback()]
    make_trainer(folder, callbacks, max_steps=arguments.steps, max_epochs=-1).fit(module, data)
    refined = module.export()
    save_weights(refined.state_dict(), path)
    return refined


@torch.no_grad()
def evaluate(network: nn.Module, held_out: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, float]:
    """Dice in % per organ on whole held-out volumes, by a sliding window."""
    inferer = sliding_window(arguments.patch_size)
    device = next(network.parameters()).device
    network.eval()
    predictions = [inferer(volume["image"][None].to(device), network)[0].argmax(0).cpu() for volume in held_out]
    return organ_dice(predictions, held_out, class_names(arguments.data))


def run(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Run one seed and return the Dice before and after refinement."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    held_out = read_volumes(arguments.data, arguments.report, arguments.size, arguments.fraction)
    pl.seed_everything(seed, workers=True)
    source = source_network(arguments, seed)
    before = evaluate(source, held_out, arguments)
    return {"before": before, "after": evaluate(refined_network(arguments, seed, source), held_out, arguments)}


def _source_options(arguments: argparse.Namespace) -> str:
    patch = "x".join(map(str, arguments.patch_size))
    return f"{arguments.size}-{patch}-{arguments.source_steps}-{arguments.fraction}"


def _options(arguments: argparse.Namespace) -> str:
    return f"{_source_options(arguments)}-{arguments.steps}-{arguments.round_steps}"


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Run the command line and return the Dice before and after and the gain, one entry per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json, mr/ and ct/")
    parser.add_argument("--out", type=Path, default=Path("runs/abdomen3d"))
    parser.add_argument("--report", default="target_val", help="patients to evaluate on")
    parser.add_argument("--size", type=int, default=96, help="number of rows and columns of a volume")
    parser.add_argument("--patch-size", type=int, nargs=3, default=[32, 64, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--source-steps", type=int, default=3200)
    parser.add_argument("--steps", type=int, default=360, help="steps of refinement")
    parser.add_argument("--round-steps", type=int, default=40, help="steps with the same labels")
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the patients, for a smoke test")
    arguments = parser.parse_args(argv)

    results = [run(arguments, seed) for seed in arguments.seeds]
    return write_results(arguments.out, arguments.report, results)


if __name__ == "__main__":
    main()

"""Base networks of the benchmark of methods, trained once and saved.

- `plain`: trained on the source images without remapping: an unadapted MR network (CT in the other direction).
- `remapped`: trained with random intensity remapping, as in `examples/abdomen.py`.
- `remapped-bn`: `remapped` with BatchNorm statistics re-estimated on the target images.
- `advent`: `remapped` after adversarial adaptation (`examples/uda/advent.py`).
- `oracle`: trained on target labels, as an upper bound. No method refines it.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

for folder in (".", "uda"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / folder))

from abdomen_data import CLASS_NAMES, AbdomenSlices
from advent import adapt
from networks import build_network
from source_training import SourceModule

from apl_lightning.refinement.batchnorm import adapt_batch_norm

BASES = ("remapped-bn", "advent", "remapped", "plain")
SPLITS = {
    "mr-to-ct": {name: name for name in ("source_train", "target_adapt", "target_val")},
    "ct-to-mr": {"source_train": "target_adapt", "target_adapt": "source_train", "target_val": "source_val"},
}


class Setting(NamedTuple):
    """Settings that all runs of a benchmark share."""

    data: Path
    out: Path
    direction: str
    network: str
    size: int
    every: int
    fraction: float
    source_epochs: int
    advent_epochs: int
    epochs: int
    precision: str

    def read(self, split: str, labelled: bool = True) -> AbdomenSlices:
        """Read a split for the direction of the benchmark; of the target training images only every n-th slice."""
        every = self.every if split == "target_adapt" else 1
        return AbdomenSlices(self.data, SPLITS[self.direction][split], self.size, labelled, self.fraction, every)


def base_network(kind: str, setting: Setting, seed: int) -> nn.Module:
    """Load the base of this kind and seed, or train and save it."""
    network = build_network(setting.network, len(CLASS_NAMES))
    path = setting.out / "bases" / f"{kind}-{seed}.pt"
    if not path.exists():
        pl.seed_everything(seed, workers=True, verbose=False)
        _train(kind, network, setting, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        torch.save(network.state_dict(), unfinished)
        unfinished.replace(path)
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return network.eval()


def trainer(epochs: int, **options: Any) -> pl.Trainer:
    """Create a trainer on one device without output."""
    return pl.Trainer(
        max_epochs=epochs,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )


def _train(kind: str, network: nn.Module, setting: Setting, seed: int) -> None:
    if kind in ("plain", "remapped", "oracle"):
        data = setting.read("target_adapt" if kind == "oracle" else "source_train")
        loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
        trainer(setting.source_epochs).fit(SourceModule(network, remap=kind == "remapped"), loader)
        return
    network.load_state_dict(base_network("remapped", setting, seed).state_dict())
    target = setting.read("target_adapt", labelled=False)
    if kind == "remapped-bn":
        batches = DataLoader(target, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))
        adapt_batch_norm(network, (batch["image"] for batch in batches))
    else:
        adapt(network, setting.read("source_train"), target, trainer(setting.advent_epochs))

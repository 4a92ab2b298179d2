"""Base networks of the benchmark of methods, each trained when it is first asked for, and saved.

- `plain`: trained on the source images as they are.
- `remapped`: trained with random intensity remapping, as in `examples/abdomen.py`.
- `oracle`: trained on target labels, as an upper bound. No method refines it.
- The seven systems of `examples/uda/adapt.py`, each as `apl_lightning.checkpoints.load` reads its file. `cyclegan` is a
  pipeline: its generator from target to source images, then the network of `plain`.
"""

import sys
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

for folder in (".", "uda"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / folder))

from adapt import FILES, SIZES, adapt, load_adapted, prepared
from networks import build_network, save_weights
from settings import Setting, trainer
from slices import Slices
from source_training import SourceModule

from apl_lightning.checkpoints import Translated

SYSTEMS, SYSTEM_SIZES = tuple(FILES), SIZES
BASES = ("plain", "remapped", "oracle", *SYSTEMS)


def base_network(kind: str, setting: Setting, seed: int) -> nn.Module:
    """Load the base of this kind and seed, or train and save it."""
    return (_adapted if kind in SYSTEMS else _trained)(kind, setting, seed).eval()


def images_for(network: nn.Module, setting: Setting, split: str) -> Slices:
    """Read a split as the network needs it: through its `preprocess`, if it has one."""
    images = setting.read(split)
    return prepared(images, network) if hasattr(network, "preprocess") else images


def _trained(kind: str, setting: Setting, seed: int) -> nn.Module:
    budget = setting.budget
    pl.seed_everything(seed, workers=True, verbose=False)  # before the initial weights are drawn
    network = build_network(budget.network, len(setting.class_names)).to(memory_format=torch.channels_last)
    path = setting.out / "bases" / f"{kind}-{seed}.pt"
    if not path.exists():
        data = setting.read("target_adapt" if kind == "oracle" else "source_train")
        loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
        trainer(budget, max_steps=budget.source_steps).fit(SourceModule(network, remap=kind == "remapped"), loader)
        save_weights(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return network


def _adapted(system: str, setting: Setting, seed: int) -> nn.Module:
    folder, classes = setting.out / "bases" / f"adapted-{seed}", len(setting.class_names)
    if not (folder / FILES[system]).exists():
        if system == "cycada":
            _adapted("cyclegan", setting, seed)
        source, target = setting.read("source_train"), setting.read("target_adapt", labelled=False)
        pl.seed_everything(seed, workers=True, verbose=False)
        size = SIZES[setting.budget.systems]
        adapt(system, source, target, size, folder, partial(trainer, setting.budget, max_epochs=1), classes)
    network = load_adapted(system, folder, classes)
    return Translated(network, _trained("plain", setting, seed), (0, 1)) if system == "cyclegan" else network

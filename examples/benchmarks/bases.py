"""Base networks of the benchmark of methods, each trained when it is first asked for, and saved.

- `plain`: trained on the source images as they are.
- `remapped`: trained with random intensity remapping, as in `examples/abdomen.py`.
- `advent`: `remapped` after adversarial adaptation (`examples/uda/advent.py`).
- `oracle`: trained on target labels, as an upper bound. No method refines it.
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

for folder in (".", "uda"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / folder))

from advent import adapt
from networks import build_network
from settings import Setting, trainer
from source_training import SourceModule

BASES = ("plain", "remapped", "advent", "oracle")


def base_network(kind: str, setting: Setting, seed: int) -> nn.Module:
    """Load the base of this kind and seed, or train and save it."""
    network = build_network(setting.budget.network, len(setting.class_names))
    path = setting.out / "bases" / f"{kind}-{seed}.pt"
    if not path.exists():
        pl.seed_everything(seed, workers=True, verbose=False)
        network.to(memory_format=torch.channels_last)
        _train(kind, network, setting, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        torch.save(network.state_dict(), unfinished)
        unfinished.replace(path)
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return network.eval()


def _train(kind: str, network: nn.Module, setting: Setting, seed: int) -> None:
    budget = setting.budget
    if kind == "advent":
        network.load_state_dict(base_network("remapped", setting, seed).state_dict())
        source, target = setting.read("source_train"), setting.read("target_adapt", labelled=False)
        # In steps, Lightning would count those of both optimisers.
        epochs = max(1, round(budget.advent_steps * 8 / max(len(source), len(target))))
        adapt(network, len(setting.class_names), source, target, trainer(budget, max_epochs=epochs))
        return
    data = setting.read("target_adapt" if kind == "oracle" else "source_train")
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    trainer(budget, max_steps=budget.source_steps).fit(SourceModule(network, remap=kind == "remapped"), loader)

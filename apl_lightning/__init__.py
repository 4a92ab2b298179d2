"""Adaptive Pseudo Labeling for PyTorch Lightning: refine a pretrained segmentation network on unlabelled images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apl_lightning.data import EpochSampler, LazyDataLoader, RandomAffine, TargetDataset
from apl_lightning.denoisers import APL
from apl_lightning.heads import DualHeadModel, HeadNotFoundError, Logits, add_dual_heads
from apl_lightning.metrics import CaseDice
from apl_lightning.presets import PAPER
from apl_lightning.store import PseudoLabelStore

if TYPE_CHECKING:
    from apl_lightning.pytorch_lightning import (
        APLModule,
        PseudoLabelCallback,
        PseudoLabelOverlay,
        RefinementModule,
        SelfTrainingModule,
        TargetDataModule,
        TentModule,
    )

__all__ = [
    "APL",
    "PAPER",
    "APLModule",
    "CaseDice",
    "DualHeadModel",
    "EpochSampler",
    "HeadNotFoundError",
    "LazyDataLoader",
    "Logits",
    "PseudoLabelCallback",
    "PseudoLabelOverlay",
    "PseudoLabelStore",
    "RandomAffine",
    "RefinementModule",
    "SelfTrainingModule",
    "TargetDataModule",
    "TargetDataset",
    "TentModule",
    "add_dual_heads",
]
__version__ = "0.2.0.dev0"


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """The classes for `pytorch_lightning`, which is imported with the first of them."""
    if name in __all__:
        return getattr(import_module("apl_lightning.pytorch_lightning"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

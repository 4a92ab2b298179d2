"""Adaptive Pseudo Labeling for PyTorch Lightning: refine a pretrained segmentation network on unlabelled images."""

from apl_lightning.callback import PseudoLabelCallback
from apl_lightning.data import EpochSampler, LazyDataLoader, RandomAffine, TargetDataModule, TargetDataset
from apl_lightning.denoisers import APL
from apl_lightning.heads import DualHeadModel, HeadNotFoundError, Logits, add_dual_heads
from apl_lightning.metrics import CaseDice
from apl_lightning.presets import PAPER
from apl_lightning.refinement import APLModule, RefinementModule, SelfTrainingModule, TentModule
from apl_lightning.store import PseudoLabelStore
from apl_lightning.visualize import PseudoLabelOverlay

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
__version__ = "0.1.0"

"""Adaptive Pseudo Labeling for PyTorch Lightning: refine a pretrained segmentation network on unlabelled images."""

from apl_lightning.augment import RandomAffine
from apl_lightning.callback import PseudoLabelCallback
from apl_lightning.datamodule import LazyDataLoader, TargetDataModule
from apl_lightning.dataset import TargetDataset
from apl_lightning.dual import DualHeadModel, Logits
from apl_lightning.heads import add_dual_heads
from apl_lightning.module import APLModule
from apl_lightning.probe import HeadNotFoundError
from apl_lightning.sampler import EpochSampler
from apl_lightning.self_training import SelfTrainingModule
from apl_lightning.store import PseudoLabelStore
from apl_lightning.tent import TentModule

__all__ = [
    "APLModule",
    "DualHeadModel",
    "EpochSampler",
    "HeadNotFoundError",
    "LazyDataLoader",
    "Logits",
    "PseudoLabelCallback",
    "PseudoLabelStore",
    "RandomAffine",
    "SelfTrainingModule",
    "TargetDataModule",
    "TargetDataset",
    "TentModule",
    "add_dual_heads",
]
__version__ = "0.1.0"

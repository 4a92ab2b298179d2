"""Networks and files of the seven adaptation systems of the paper's table, read safely and without their code."""

from apl_lightning.checkpoints.deeplab import DeepLabV2, DeepLabVGG
from apl_lightning.checkpoints.drn import DRN
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.fcn8s import FCN8s
from apl_lightning.checkpoints.identify import identify
from apl_lightning.checkpoints.loading import load
from apl_lightning.checkpoints.resnet_generator import ResnetGenerator
from apl_lightning.checkpoints.sifa import SIFA
from apl_lightning.checkpoints.sifa_generator import SIFAGenerator
from apl_lightning.checkpoints.translated import Translated

__all__ = [
    "DRN",
    "SIFA",
    "CheckpointError",
    "DeepLabV2",
    "DeepLabVGG",
    "FCN8s",
    "ResnetGenerator",
    "SIFAGenerator",
    "Translated",
    "identify",
    "load",
]

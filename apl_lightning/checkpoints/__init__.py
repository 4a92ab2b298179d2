"""Load and identify checkpoints of seven domain adaptation systems, without executing code from the files."""

from apl_lightning.checkpoints.describe import identify
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.loading import load
from apl_lightning.checkpoints.networks import (
    DRN,
    SIFA,
    DeepLabV2,
    DeepLabVGG,
    FCN8s,
    RawImageNetwork,
    ResnetGenerator,
    SIFAGenerator,
    Translated,
)
from apl_lightning.checkpoints.weights import load_weights

__all__ = [
    "DRN",
    "SIFA",
    "CheckpointError",
    "DeepLabV2",
    "DeepLabVGG",
    "FCN8s",
    "RawImageNetwork",
    "ResnetGenerator",
    "SIFAGenerator",
    "Translated",
    "identify",
    "load",
    "load_weights",
]

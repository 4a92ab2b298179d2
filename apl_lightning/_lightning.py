"""The one door to Lightning: everything of it that the package uses comes through here."""

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.seed import isolate_rng
from pytorch_lightning.utilities.types import STEP_OUTPUT

__all__ = [
    "STEP_OUTPUT",
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "ProgressBar",
    "RichProgressBar",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "isolate_rng",
]

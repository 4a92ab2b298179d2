"""A supervised Lightning project: a network, a LightningModule, a LightningDataModule and a Trainer.

`existing_project_apl.py` is the same project with Adaptive Pseudo Labeling.
"""

import argparse

import pytorch_lightning as pl
import torch
from monai.networks.nets import BasicUNet
from phantom import CLASS_NAMES, Phantoms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Data(pl.LightningDataModule):
    """Training and validation images of one hospital."""

    def __init__(self, patients: int) -> None:
        super().__init__()
        self.patients = patients

    def setup(self, stage: str) -> None:
        self.images = Phantoms("ct", self.patients, seed=2)
        self.unseen = Phantoms("ct", 8, seed=3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.images, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.unseen, batch_size=8)


class Segmentation(pl.LightningModule):
    """Supervised training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch["image"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        correct = self.model(batch["image"]).argmax(1) == batch["label"]
        self.log("val/accuracy", correct.float().mean(), batch_size=len(correct))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """Train and return the logged metrics."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--patients", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args(argv)
    network = BasicUNet(2, 1, len(CLASS_NAMES), features=(8, 8, 16, 32, 64, 8))
    module = Segmentation(network)
    data = Data(arguments.patients)
    callbacks = [pl.callbacks.LearningRateMonitor()]
    trainer = pl.Trainer(max_epochs=arguments.epochs, callbacks=callbacks, accelerator="cpu", default_root_dir="runs")
    trainer.fit(module, data)
    return trainer.callback_metrics


if __name__ == "__main__":
    main()

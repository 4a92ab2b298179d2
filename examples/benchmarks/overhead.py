"""Measure an epoch of refinement relative to an epoch of plain fine-tuning plus one inference pass.

    python examples/benchmarks/overhead.py

Both run in Lightning with the same images, network, batch size and optimiser. Plain fine-tuning trains with a weighted
cross-entropy on labels in memory and predicts all images once per epoch. Refinement makes, writes and reads pseudo
labels and trains with both losses. The measurements alternate, and the ratio is the median over the turns.
"""

import argparse
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.losses import weighted_cross_entropy

CLASSES = 5
NETWORKS = {
    "MONAI UNet (16, 32, 64, 128)": lambda: UNet(
        2, 1, CLASSES, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="batch"
    ),
    "ResNet-18 U-Net": lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=CLASSES),
}


class PlainModule(pl.LightningModule):
    """Fine-tuning with weighted cross-entropy and one inference pass before each epoch."""

    def __init__(self, model: nn.Module, images: Tensor, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self.images = images
        self.batch_size = batch_size

    def on_train_epoch_start(self) -> None:
        self.model.eval()
        with torch.no_grad():
            for batch in self.images.split(self.batch_size):
                self.model(batch.to(self.device))
        self.model.train()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        image, label, weight = batch
        loss = weighted_cross_entropy(self.model(image), label, weight)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class EpochTimer(pl.Callback):
    """Records the seconds of the last epoch, including the hooks at its start."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def seconds_of_an_epoch(module: pl.LightningModule, data: Any, callbacks: list[pl.Callback]) -> float:
    """The seconds of the second of two epochs; the first one is a warm-up."""
    timer = EpochTimer()
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[timer, *callbacks],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return timer.seconds


def measure(build: Any, size: int, count: int, batch_size: int, turns: int) -> list[float]:
    """The ratio of refinement to plain fine-tuning in each turn."""
    torch.manual_seed(0)
    network = build()
    images = torch.rand(count, 1, size, size)
    labels, weights = torch.randint(CLASSES, (count, size, size)), torch.rand(count, size, size)
    ratios = []
    for turn in range(turns):
        plain = PlainModule(network, images, batch_size)
        loader = DataLoader(TensorDataset(images, labels, weights), batch_size, shuffle=True)
        reference = seconds_of_an_epoch(plain, loader, [])
        with tempfile.TemporaryDirectory() as folder:
            data = TargetDataModule(list(images), batch_size=batch_size, transform=None, store_dir=folder)
            refined = seconds_of_an_epoch(
                APLModule(network, CLASSES, batch_norm="adapt"), data, [PseudoLabelCallback()]
            )
        ratios.append(refined / reference)
        print(f"  turn {turn}: plain {reference:.2f} s, refinement {refined:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    return ratios


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command line and return the median ratio of each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args(argv)
    medians = {}
    for name, build in NETWORKS.items():
        print(name, flush=True)
        ratios = measure(build, arguments.size, arguments.images, arguments.batch_size, arguments.turns)
        medians[name] = torch.tensor(ratios).median().item()
    print(f"\nRefinement epoch / (fine-tuning epoch + inference pass), {arguments.size} x {arguments.size}, median:")
    for name, ratio in medians.items():
        print(f"  {name}: {ratio:.3f}")
    return medians


if __name__ == "__main__":
    main()

"""Supervised training of the source network of the examples.

Training uses random intensity remapping: random shallow convolutions, similar to GIN (Ouyang et al.,
"Causality-inspired Single-source Domain Generalization", TMI 2022). A network that sees the liver both dark and bright
learns shapes rather than intensities, so its first pseudo labels on another modality are better.
"""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional as F


def random_affine(image: Tensor, label: Tensor, degrees: float = 15, zoom: float = 0.15) -> tuple[Tensor, Tensor]:
    """Rotate, scale and shift each image (B, 1, *S) and its label (B, *S) by random amounts; rotations are in plane."""
    batch, dimensions = len(image), image.ndim - 2
    angle = (torch.rand(batch) * 2 - 1) * math.radians(degrees)
    scale = 1 + (torch.rand(batch) * 2 - 1) * zoom
    shift = (torch.rand(batch, dimensions) * 2 - 1) * 0.1
    matrix = torch.eye(dimensions).repeat(batch, 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin(), angle.sin()
    theta = torch.cat([matrix * scale[:, None, None], shift[:, :, None]], dim=2).to(image)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    moved = F.grid_sample(image, grid, align_corners=False)
    labels = F.grid_sample(label[:, None].to(image.dtype), grid, mode="nearest", align_corners=False)
    return moved, labels[:, 0].long()


def random_remapping(image: Tensor, hidden: int = 4) -> Tensor:
    """Mix each image (B, 1, *S) in [0, 1] with a random two-layer convolution of itself.

    Each image has its own random kernels, of size 1 or 3 along each axis. The result is scaled to [0, 1].
    """
    batch, dimensions = len(image), image.ndim - 2
    convolve: Any = F.conv2d if dimensions == 2 else F.conv3d
    size = 1 if torch.rand(()) < 0.5 else 3
    first = torch.randn(batch * hidden, 1, *[size] * dimensions, device=image.device)
    second = torch.randn(batch, hidden, *[size] * dimensions, device=image.device)
    bias = torch.randn(batch * hidden, device=image.device)
    remapped = convolve(image.transpose(0, 1), first, bias, padding=size // 2, groups=batch)
    remapped = convolve(F.leaky_relu(remapped), second, padding=size // 2, groups=batch)
    remapped = unit_range(remapped.transpose(0, 1))
    share = torch.rand(batch, *[1] * (dimensions + 1), device=image.device)
    return unit_range(share * remapped + (1 - share) * image)


def unit_range(image: Tensor) -> Tensor:
    """Scale each image to [0, 1]."""
    axes = tuple(range(1, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    return (image - low) / (high - low).clamp_min(1e-6)


def moved(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """`random_affine` of images (B, 1, *S) whose black is not 0; what comes into view is black."""
    black = image.amin((1, 2, 3), keepdim=True)
    image, label = random_affine(image - black, label)
    return image + black, label


def segmentation_loss() -> DiceCELoss:
    """Dice and cross-entropy of logits (B, C, *S) and labels (B, 1, *S)."""
    return DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)


class SourceModule(pl.LightningModule):
    """Supervised training with Dice and cross-entropy on batches of `{"image", "label"}`.

    Args:
        model: The network, which is trained in place.
        learning_rate: The maximum learning rate of the one-cycle schedule.
        remap: Whether to remap intensities at random.
    """

    def __init__(self, model: nn.Module, learning_rate: float = 2e-3, remap: bool = True) -> None:
        super().__init__()
        self.model = model
        self.remap = remap
        self.learning_rate = learning_rate
        self.criterion = segmentation_loss()

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        image, label = random_affine(batch["image"], batch["label"])
        image = random_remapping(image) if self.remap else image
        loss: Tensor = self.criterion(self(image), label[:, None])
        self.log("source/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

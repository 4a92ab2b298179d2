"""Translate between source and target images without pairs: CycleGAN (Zhu et al., ICCV 2017), from the paper.

    L = LSGAN both ways + 10 |G_B(G_A(a)) - a| + 10 |G_A(G_B(b)) - b| + 5 |G_A(b) - b| + 5 |G_B(a) - a|

A is the source, B the target; `to_target` is G_A and `to_source` is G_B. A network that was trained on source images
then segments G_B(b): `apl_lightning.checkpoints.Translated`.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from adversarial import FAKE, REAL, ImagePool, adam_pair, least_squares, linear_after_half, patch_gan, scheduled
from source_training import random_affine
from torch import Tensor, nn
from torch.nn import functional as F

CYCLE = 10.0


class CycleGANModule(pl.LightningModule):
    """Two generators and two discriminators on batches of source and target images in [0, 1].

    Args:
        to_target: Generator G_A from source to target images, both in [-1, 1].
        to_source: Generator G_B from target to source images.
        width: Channels of the first layer of the discriminators.
        identity: Weight of the identity loss.
        learning_rate: Learning rate of Adam for all networks.
    """

    def __init__(
        self,
        to_target: nn.Module,
        to_source: nn.Module,
        width: int = 64,
        identity: float = 5.0,
        learning_rate: float = 2e-4,
    ) -> None:
        super().__init__()
        self.to_target, self.to_source = to_target, to_source
        self.judges = nn.ModuleDict({domain: patch_gan(1, width) for domain in ("source", "target")})
        self.pools = {domain: ImagePool() for domain in ("source", "target")}
        self.identity = identity
        self.learning_rate = learning_rate
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, dict[str, Tensor]]) -> None:
        image, label = random_affine(batch["source"]["image"], batch["source"]["label"])
        unlabelled, _ = random_affine(batch["target"]["image"], label)
        source, target = 2 * image - 1, 2 * unlabelled - 1
        generator_optimizer, discriminator_optimizer = self.optimizers()

        generator_optimizer.zero_grad()
        self.judges.requires_grad_(False)
        fake_target, fake_source = self.to_target(source), self.to_source(target)
        losses = self.generator_losses(source, target, fake_target, fake_source)
        losses |= self.segmentation_losses(fake_target, label)
        self.manual_backward(torch.stack(list(losses.values())).sum())
        generator_optimizer.step()

        discriminator_optimizer.zero_grad()
        self.judges.requires_grad_(True)
        for domain, real, fake in (("target", target, fake_target), ("source", source, fake_source)):
            judge, earlier = self.judges[domain], self.pools[domain].exchange(fake)
            self.manual_backward((least_squares(judge(real), REAL) + least_squares(judge(earlier), FAKE)) / 2)
        discriminator_optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({f"adapt/{name}": loss for name, loss in losses.items()}, prog_bar=True)

    def generator_losses(
        self, source: Tensor, target: Tensor, fake_target: Tensor, fake_source: Tensor
    ) -> dict[str, Tensor]:
        """The weighted losses of both generators, from images (B, 1, *S) in [-1, 1] and their translations."""
        deception = least_squares(self.judges["target"](fake_target), REAL)
        deception = deception + least_squares(self.judges["source"](fake_source), REAL)
        cycle = F.l1_loss(self.to_source(fake_target), source) + F.l1_loss(self.to_target(fake_source), target)
        losses = {"deception": deception, "cycle": CYCLE * cycle}
        if self.identity:
            same = F.l1_loss(self.to_target(target), target) + F.l1_loss(self.to_source(source), source)
            losses["identity"] = self.identity * same
        return losses

    def segmentation_losses(self, fake_target: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Further losses of the same optimiser; none in CycleGAN."""
        return {}

    def configure_optimizers(self) -> Any:
        return scheduled(self, adam_pair(self, self.learning_rate), linear_after_half)

"""Adapt a network on translated source images and in the space of its scores: CyCADA (Hoffman et al., ICML 2018).

The network learns the labels of source images that a CycleGAN has translated to the target domain. A discriminator of
pixels learns to distinguish its scores on them from those on target images, and the network learns to deceive it, in
those steps in which the discriminator is right for more than 60 % of the pixels. Implemented from the paper.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from adversarial import FROM_SOURCE, FROM_TARGET, cross_entropy_to, polynomial, scheduled
from source_training import random_affine, segmentation_loss
from torch import Tensor, nn

ADVERSARIAL = 0.1
NEEDED_ACCURACY = 0.6


def score_discriminator(classes: int, width: int = 512) -> nn.Sequential:
    """Three 1 x 1 convolutions; one logit per pixel."""
    return nn.Sequential(
        nn.Conv2d(classes, width, 1),
        nn.ReLU(),
        nn.Conv2d(width, width // 2, 1),
        nn.ReLU(),
        nn.Conv2d(width // 2, 1, 1),
    )


def accuracy(source: Tensor, target: Tensor) -> float:
    """The share of pixels whose domain a discriminator tells right, from its logits for both domains."""
    return float(((source > 0).float().mean() + (target <= 0).float().mean()) / 2)


class CyCADAModule(pl.LightningModule):
    """Adaptation of the scores, on translated source images and target images in [0, 1].

    Args:
        network: A segmentation network with `preprocess`, adapted in place.
        to_target: Trained generator from source to target images, both in [-1, 1]; it stays as it is.
        classes: Number of channels of the logits.
        width: Channels of the first layer of the discriminator.
        learning_rate: Learning rate of the network; that of the discriminator is 1e-4.
    """

    def __init__(
        self, network: nn.Module, to_target: nn.Module, classes: int, width: int = 512, learning_rate: float = 5e-4
    ) -> None:
        super().__init__()
        self.network = network
        self.to_target = to_target.requires_grad_(False)
        self.discriminator = score_discriminator(classes, width)
        self.learning_rate = learning_rate
        self.criterion = segmentation_loss()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, dict[str, Tensor]]) -> None:
        self.to_target.eval()
        image, label = random_affine(batch["source"]["image"], batch["source"]["label"])
        translated = ((self.to_target(2 * image - 1).float() + 1) / 2).clamp(0, 1)
        both = torch.cat([translated, batch["target"]["image"].clamp(0, 1)])
        # One forward pass for both, so that the batch statistics match the running statistics of BatchNorm.
        source, target = self.network(self.network.preprocess(both)).float().split(len(image))
        network_optimizer, discriminator_optimizer = self.optimizers()

        discriminator_optimizer.zero_grad()
        answers = [self.discriminator(scores.detach()) for scores in (source, target)]
        discrimination = cross_entropy_to(answers[0], FROM_SOURCE) + cross_entropy_to(answers[1], FROM_TARGET)
        self.manual_backward(discrimination / 2)
        discriminator_optimizer.step()

        network_optimizer.zero_grad()
        loss = segmentation = self.criterion(source, label[:, None])
        if accuracy(*answers) > NEEDED_ACCURACY:
            loss = loss + ADVERSARIAL * cross_entropy_to(self.discriminator(target), FROM_SOURCE)
        self.manual_backward(loss)
        network_optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"adapt/segmentation": segmentation, "adapt/discrimination": discrimination}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=5e-4),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-4, betas=(0.5, 0.999)),
        ]
        return scheduled(self, optimizers, polynomial)

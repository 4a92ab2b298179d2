"""Adapt a network in its output space: AdaptSegNet (Tsai et al., CVPR 2018), implemented from the paper.

A discriminator D learns to distinguish the predictions on target images from those on source images. The segmentation
network learns the source labels and to deceive D on target images, at two levels (main and aux):

    L = L_seg(main) + 0.1 L_seg(aux) + 0.1 BCE(D(p_main), "source") + 0.02 BCE(D_aux(p_aux), "source")

The adversarial weights are a hundred times those of the paper, whose networks are pretrained. The paper's table calls
the method AdaOutput.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from adversarial import FROM_SOURCE, FROM_TARGET, cross_entropy_to, output_discriminator, polynomial, scheduled
from evaluation import logits_of
from source_training import random_affine, segmentation_loss
from torch import Tensor, nn

# Segmentation and adversarial weight of each level.
MAIN, AUX = (1.0, 0.1), (0.1, 0.02)


class AdaptSegNetModule(pl.LightningModule):
    """Adversarial adaptation on pairs of a labelled source batch and an unlabelled target batch.

    Args:
        network: A segmentation network with `preprocess`, adapted in place. It returns `(aux, main)` logits or one
            tensor, at the size of the image.
        classes: Number of channels of the logits.
        width: Channels of the first layer of the discriminators.
        learning_rate: Learning rate of the network; that of the discriminators is 5e-4.
    """

    def __init__(self, network: nn.Module, classes: int, width: int = 64, learning_rate: float = 5e-4) -> None:
        super().__init__()
        self.network = network
        self.discriminators = nn.ModuleList(output_discriminator(classes, width) for _ in (MAIN, AUX))
        self.learning_rate = learning_rate
        self.criterion = segmentation_loss()
        self.automatic_optimization = False

    def maps(self, logits: Tensor) -> Tensor:
        """What the discriminators see: the probabilities (B, C, *S)."""
        return logits.softmax(dim=1)

    def training_step(self, batch: dict[str, dict[str, Tensor]]) -> None:
        image, label = random_affine(batch["source"]["image"], batch["source"]["label"])
        both = torch.cat([image, batch["target"]["image"]]).clamp(0, 1)  # interpolation may round to above 1
        # One forward pass for both, so that the batch statistics match the running statistics of BatchNorm.
        levels = [z.float().split(len(image)) for z in logits_of(self.network, self.network.preprocess(both))]
        network_optimizer, discriminator_optimizer = self.optimizers()

        network_optimizer.zero_grad()
        segmentation, deception = torch.zeros(2, device=self.device)
        for (source, target), discriminator, weights in zip(levels, self.discriminators, (MAIN, AUX), strict=False):
            segmentation = segmentation + weights[0] * self.criterion(source, label[:, None])
            deceived = cross_entropy_to(discriminator(self.maps(target)), FROM_SOURCE)
            deception = deception + weights[1] * deceived
        self.manual_backward(segmentation + deception)
        network_optimizer.step()

        discriminator_optimizer.zero_grad()
        for (source, target), discriminator in zip(levels, self.discriminators, strict=False):
            discrimination = cross_entropy_to(discriminator(self.maps(source.detach())), FROM_SOURCE)
            discrimination += cross_entropy_to(discriminator(self.maps(target.detach())), FROM_TARGET)
            self.manual_backward(discrimination / 2)
        discriminator_optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"adapt/segmentation": segmentation, "adapt/deception": deception}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=5e-4),
            torch.optim.Adam(self.discriminators.parameters(), lr=5e-4, betas=(0.9, 0.99)),
        ]
        return scheduled(self, optimizers, polynomial)

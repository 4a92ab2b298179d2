"""What the adaptation systems share: discriminators of patches, their losses, a pool of images, and learning rates."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, PolynomialLR

# What a discriminator learns to say about its input.
FROM_TARGET, FROM_SOURCE = 0.0, 1.0
FAKE, REAL = 0.0, 1.0


def output_discriminator(classes: int, width: int = 64) -> nn.Sequential:
    """AdaptSegNet's discriminator: four strided convolutions and a classifier as in DCGAN, one logit per patch."""
    layers: list[nn.Module] = []
    channels = [classes, width, 2 * width, 4 * width, 8 * width]
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, stride=2, padding=1))


def patch_gan(channels: int, width: int = 64) -> nn.Sequential:
    """The 70 x 70 PatchGAN of pix2pix with instance norm; one score per patch."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for factor, stride in ((1, 2), (2, 2), (4, 1)):
        convolution = nn.Conv2d(factor * width, 2 * factor * width, 4, stride=stride, padding=1)
        layers += [convolution, nn.InstanceNorm2d(2 * factor * width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))


def cross_entropy_to(logits: Tensor, domain: float) -> Tensor:
    """Binary cross-entropy between the logits of a discriminator and one domain."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


def least_squares(scores: Tensor, answer: float) -> Tensor:
    """The loss of LSGAN (Mao et al., ICCV 2017): mean (score - answer)^2."""
    return (scores - answer).square().mean()


class ImagePool:
    """Hands a discriminator the new fake images or, half of the time, earlier ones (Shrivastava et al., CVPR 2017).

    Args:
        size: Number of images that are kept.
    """

    def __init__(self, size: int = 50) -> None:
        self.size = size
        self.images: list[Tensor] = []

    def exchange(self, images: Tensor) -> Tensor:
        """Return as many images (B, C, *S) as it gets, detached."""
        return torch.stack([self._exchange(image) for image in images.detach()])

    def _exchange(self, image: Tensor) -> Tensor:
        if len(self.images) < self.size:
            self.images.append(image)
            return image
        if random.random() < 0.5:
            return image
        place = random.randrange(self.size)
        earlier, self.images[place] = self.images[place], image
        return earlier


def adam_pair(module: nn.Module, learning_rate: float) -> list[Optimizer]:
    """CycleGAN's two Adams: one for all networks of a module but its `judges`, one for these."""
    parameters = dict(module.named_parameters())
    judges = [parameter for name, parameter in parameters.items() if name.startswith("judges.")]
    others = [parameter for name, parameter in parameters.items() if not name.startswith("judges.")]
    return [Adam(group, lr=learning_rate, betas=(0.5, 0.999)) for group in (others, judges)]


def scheduled(
    module: pl.LightningModule, optimizers: list[Optimizer], schedule: Callable[[Optimizer, int], LRScheduler]
) -> Any:
    """The optimisers with a schedule over all steps, as `configure_optimizers` returns them."""
    steps = int(module.trainer.estimated_stepping_batches)
    return optimizers, [schedule(optimizer, steps) for optimizer in optimizers]


def polynomial(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Decrease the learning rate to 0 as (1 - step / steps)^0.9."""
    return PolynomialLR(optimizer, steps, power=0.9)


def linear_after_half(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Keep the learning rate for the first half of the steps, then decrease it linearly to 0."""
    return LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))

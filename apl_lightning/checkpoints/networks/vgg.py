"""The convolutional layers of VGG (Simonyan and Zisserman, ICLR 2015), numbered as in torchvision."""

from collections.abc import Iterable

from torch import nn


def vgg_layers(stages: Iterable[tuple[int, int, int]], pool: nn.Module, num_pools: int = 5) -> nn.Sequential:
    """Build the 3 x 3 convolutions of a VGG network, each with a ReLU, and the pooling of the first `num_pools` stages.

    A stage is the number of output channels, the number of convolutions, and their dilation.
    """
    layers: list[nn.Module] = []
    channels = 3
    for index, (width, convolutions, dilation) in enumerate(stages):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
            channels = width
        if index < num_pools:
            layers.append(pool)
    return nn.Sequential(*layers)

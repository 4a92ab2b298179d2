"""The convolutions of VGG (Simonyan and Zisserman, ICLR 2015), in the numbering of torchvision."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def vgg_layers(stages: Iterable[tuple[tuple[int, ...], int]], pool: nn.Module, pools: int = 5) -> nn.Sequential:
    """3 x 3 convolutions with ReLU in stages of (widths, dilation); a pool follows each of the first `pools` stages."""
    layers: list[nn.Module] = []
    channels = 3
    for number, (widths, dilation) in enumerate(stages):
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
            channels = width
        layers += [pool] if number < pools else []
    return nn.Sequential(*layers)

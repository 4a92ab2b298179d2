"""SIFA's generator from source to target images (Chen et al., AAAI 2019 and TMI 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _NormalisedConvolution(nn.Module):
    """Convolution and instance norm with TensorFlow's SAME padding (strides pad one side only)."""

    def __init__(self, channels: int, width: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        before, after = ((kernel - 1) // 2,) * 2 if stride == 1 else (0, 1)
        self.padding = (before, after, before, after)
        self.conv = nn.Conv2d(channels, width, kernel, stride=stride)
        self.norm = nn.InstanceNorm2d(width, eps=1e-6, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(F.pad(x, self.padding)))
        return y


class _NormalisedUpsampling(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, width, 3, stride=2)
        self.norm = nn.InstanceNorm2d(width, eps=1e-6, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)[:, :, :-1, :-1])
        return y


class _NormalisedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = _NormalisedConvolution(128, 128)
        self.c2 = _NormalisedConvolution(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.c2(F.relu(self.c1(x))))


class SIFAGenerator(nn.Module):
    """SIFA's `g_A`: a source image (B, in_channels, H, W) as it would look in the target domain, (B, 1, H, W).

    Args:
        in_channels: 3 in version 1, where the middle channel is the image; 1 in version 2.
    """

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.c1 = _NormalisedConvolution(in_channels, 32, kernel=7)
        self.c2 = _NormalisedConvolution(32, 64, stride=2)
        self.c3 = _NormalisedConvolution(64, 128, stride=2)
        self.blocks = nn.ModuleList(_NormalisedBlock() for _ in range(9))
        self.c4 = _NormalisedUpsampling(128, 64)
        self.c5 = _NormalisedUpsampling(64, 32)
        self.c6 = nn.Conv2d(32, 1, 7, padding=3)

    def forward(self, image: Tensor) -> Tensor:
        """The translated image in [-1, 1]; H and W multiples of 4."""
        x = F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(image))))))
        for block in self.blocks:
            x = block(x)
        residual = self.c6(F.relu(self.c5(F.relu(self.c4(x)))))
        middle = image.shape[1] // 2
        return torch.tanh(image[:, middle : middle + 1] + residual)

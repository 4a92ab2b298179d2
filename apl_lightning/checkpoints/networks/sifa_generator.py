"""SIFA's generator from source to target images (Chen et al., AAAI 2019 and TMI 2020)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints.networks.raw_image import ZScorePreprocess


class _Layer(nn.Module):
    """A convolution with TensorFlow's SAME padding, then instance norm.

    With stride 2, SAME padding adds one row and column after the image, and transposed convolutions remove them.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.InstanceNorm2d(conv.out_channels, eps=1e-6, affine=True)
        before, after = (conv.kernel_size[0] // 2,) * 2 if conv.stride[0] == 1 else (0, 1)
        self.padding = (before, after, before, after)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, nn.ConvTranspose2d):
            y: Tensor = self.norm(self.conv(x)[:, :, :-1, :-1])
        else:
            y = self.norm(self.conv(F.pad(x, self.padding)))
        return y


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1 = _Layer(nn.Conv2d(width, width, 3))
        self.c2 = _Layer(nn.Conv2d(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.c2(F.relu(self.c1(x))))


class SIFAGenerator(ZScorePreprocess, nn.Module):
    """SIFA's `g_A`, which translates source images to the target domain.

    Args:
        in_channels: 3 in version 1, which translates the middle channel; 1 in version 2.
        bounds: The z-scores of source images that `preprocess` maps to -1 and 1. SIFA's data set uses (-1.8, 4.4) for
            MR and (-2.8, 3.2) for CT.
        width: Channels of the first convolution, 32 in SIFA.

    Raises:
        ValueError: If `bounds` are not two increasing numbers.
    """

    def __init__(self, in_channels: int = 1, bounds: tuple[float, float] = (-1.8, 4.4), width: int = 32) -> None:
        super().__init__()
        self.set_bounds(bounds)
        self.in_channels = in_channels
        self.c1 = _Layer(nn.Conv2d(in_channels, width, 7))
        self.c2 = _Layer(nn.Conv2d(width, 2 * width, 3, stride=2))
        self.c3 = _Layer(nn.Conv2d(2 * width, 4 * width, 3, stride=2))
        self.blocks = nn.ModuleList(_Block(4 * width) for _ in range(9))
        self.c4 = _Layer(nn.ConvTranspose2d(4 * width, 2 * width, 3, stride=2))
        self.c5 = _Layer(nn.ConvTranspose2d(2 * width, width, 3, stride=2))
        self.c6 = nn.Conv2d(width, 1, 7, padding=3)

    def forward(self, image: Tensor) -> Tensor:
        """Map a source image (B, in_channels, H, W) to (B, 1, H, W) in [-1, 1]; H and W are multiples of 4."""
        x = F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(image))))))
        for block in self.blocks:
            x = block(x)
        residual = self.c6(F.relu(self.c5(F.relu(self.c4(x)))))
        middle = image.shape[1] // 2
        return torch.tanh(image[:, middle : middle + 1] + residual)

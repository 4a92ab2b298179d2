"""DRN-C-26 and DRN-C-42, the dilated residual networks of CyCADA (Yu et al., CVPR 2017)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints.raw_image import ImageNetPreprocess

_WIDTHS = (16, 32, 64, 128, 256, 512, 512, 512)
_STRIDES = (1, 2, 2, 2, 1, 1, 1, 1)
_DILATIONS = (1, 1, 1, 1, 2, 4, 2, 1)


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dilation: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.residual = residual
        widens = stride != 1 or channels != width
        shortcut = (nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = nn.Sequential(*shortcut) if widens else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        result: Tensor = self.relu(y)
        return result


class DRN(ImageNetPreprocess, nn.Module):
    """A dilated residual network of basic blocks whose last two stages, which remove gridding, have no shortcut.

    Returns logits at the size of the image, upsampled inside (bilinear, align_corners=True).

    Args:
        num_classes: Channels of the logits.
        blocks: Blocks in each of the eight stages: (1, 1, 2, 2, 2, 2, 1, 1) for DRN-26, (1, 1, 3, 4, 6, 3, 1, 1) for
            DRN-42.
    """

    def __init__(self, num_classes: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        channels = 16
        for stage, (width, stride, dilation, count) in enumerate(
            zip(_WIDTHS, _STRIDES, _DILATIONS, blocks, strict=True), start=1
        ):
            residual = stage <= 6
            units = [_Block(channels, width, stride, dilation, residual)]
            units += [_Block(width, width, 1, dilation, residual) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*units))
            channels = width
        self.fc = nn.Conv2d(channels, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C, H, W) of a preprocessed image (B, 3, H, W)."""
        x = self.relu(self.bn1(self.conv1(image)))
        for stage in range(1, 9):
            x = self.get_submodule(f"layer{stage}")(x)
        return F.interpolate(self.fc(x), size=image.shape[2:], mode="bilinear", align_corners=True)

"""DRN-C-26 and DRN-C-42, the dilated residual networks in CyCADA (Yu et al., CVPR 2017)."""

from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints.networks.corner_resize import corner_resize
from apl_lightning.checkpoints.networks.raw_image import ImageNetPreprocess

# Output channels relative to the first stage, stride and dilation of each stage.
_STAGES = ((1, 1, 1), (2, 2, 1), (4, 2, 1), (8, 2, 1), (16, 1, 2), (32, 1, 4), (32, 1, 2), (32, 1, 1))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dilation: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.residual = residual
        shortcut = (nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
        self.downsample = nn.Sequential(*shortcut) if stride != 1 or channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        return F.relu(y, inplace=True)


class DRN(ImageNetPreprocess, nn.Module):
    """A dilated residual network that returns logits at the size of the image.

    The last two stages have no shortcuts, which removes gridding artefacts. The network upsamples its logits
    bilinearly with `align_corners=True`.

    Args:
        num_classes: Channels of the logits.
        blocks: Number of blocks in each of the eight stages: (1, 1, 2, 2, 2, 2, 1, 1) in DRN-26, and
            (1, 1, 3, 4, 6, 3, 1, 1) in DRN-42.
        width: Channels of the first stage, 16 in both; the last stages have 32 times as many.
    """

    def __init__(self, num_classes: int, blocks: tuple[int, ...], width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for number, ((times, stride, dilation), count) in enumerate(zip(_STAGES, blocks, strict=True), 1):
            residual, wide = number <= 6, times * width
            first = _Block(channels, wide, stride, dilation, residual)
            rest = (_Block(wide, wide, 1, dilation, residual) for _ in range(count - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            channels = wide
        self.fc = nn.Conv2d(channels, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map a preprocessed image (B, 3, H, W) to logits (B, num_classes, H, W)."""
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        for number in range(1, 9):
            x = self.get_submodule(f"layer{number}")(x)
        return corner_resize(self.fc(x), image)

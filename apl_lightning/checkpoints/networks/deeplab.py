"""DeepLabv2 on ResNet-101 and VGG-16, as in ADVENT and AdaptSegNet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints.networks.corner_resize import corner_resize
from apl_lightning.checkpoints.networks.raw_image import BGRPreprocess
from apl_lightning.checkpoints.networks.vgg import vgg_layers

_DILATIONS = (6, 12, 18, 24)
RESNET101 = (3, 4, 23, 3)
# Output channels, number of convolutions and dilation of each stage.
_VGG_STAGES = ((64, 2, 1), (128, 2, 1), (256, 3, 1), (512, 3, 1), (512, 3, 2), (1024, 2, 4))


class DilatedClassifier(nn.Module):
    """Compute logits as the sum of 3 x 3 convolutions with dilations 6, 12, 18 and 24.

    All checkpoints contain four branches. ADVENT adds all of them. In AdaptSegNet, a `return` inside the loop stops
    after the first two.
    """

    def __init__(self, channels: int, num_classes: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.conv2d_list = nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in _DILATIONS)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, channels, H, W) to logits (B, num_classes, H, W)."""
        scores = [branch(features) for branch in self.conv2d_list[: self.branches]]
        return torch.stack(scores).sum(dim=0)


class _Bottleneck(nn.Module):
    """The residual block of Caffe's ResNet, with the stride in the first 1 x 1 convolution."""

    def __init__(self, channels: int, width: int, stride: int, dilation: int, first: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        shortcut = (nn.Conv2d(channels, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width))
        self.downsample = nn.Sequential(*shortcut) if first else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


def _stage(channels: int, width: int, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    first = _Bottleneck(channels, width, stride, dilation, first=True)
    rest = (_Bottleneck(4 * width, width, 1, dilation, first=False) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class DeepLabV2(BGRPreprocess, nn.Module):
    """DeepLabv2 on ResNet-101, or a smaller ResNet, with output stride 8 and one or two classifiers.

    With two classifiers the network returns `(aux, main)`: `layer5` classifies the features of `layer3`, and `layer6`
    those of `layer4`. With one classifier it returns `main`. The network upsamples its logits bilinearly with
    `align_corners=True`, as the published evaluations do outside of it. The affine parameters of the batch norms are
    frozen, as in both projects.

    Args:
        num_classes: Channels of the logits.
        branches: Number of dilated convolutions in each classifier: 4 in ADVENT, 2 in AdaptSegNet.
        levels: Names of the classifiers: `("layer5", "layer6")` for two, `("layer6",)` for one in ADVENT, and
            `("layer5",)` for one in AdaptSegNet.
        width: Channels after the first convolution, 64 in ResNet-101.
        blocks: Number of blocks in each of the four stages, (3, 4, 23, 3) in ResNet-101.
    """

    def __init__(
        self,
        num_classes: int,
        branches: int,
        levels: tuple[str, ...] = ("layer5", "layer6"),
        width: int = 64,
        blocks: tuple[int, ...] = RESNET101,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _stage(width, width, blocks[0])
        self.layer2 = _stage(4 * width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, blocks[2], dilation=2)
        self.layer4 = _stage(16 * width, 8 * width, blocks[3], dilation=4)
        self.levels = levels
        for name, channels in zip(reversed(levels), (32 * width, 16 * width), strict=False):
            self.add_module(name, DilatedClassifier(channels, num_classes, branches))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map a preprocessed image (B, 3, H, W) to logits (B, num_classes, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        middle = self.layer3(self.layer2(self.layer1(x)))
        main = corner_resize(self.get_submodule(self.levels[-1])(self.layer4(middle)), image)
        if len(self.levels) == 1:
            return main
        return corner_resize(self.get_submodule(self.levels[0])(middle), image), main


class DeepLabVGG(BGRPreprocess, nn.Module):
    """AdaptSegNet's DeepLab on VGG-16, without the last two pooling layers and with output stride 8.

    The network upsamples its logits bilinearly with `align_corners=True`.

    Args:
        num_classes: Channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = vgg_layers(_VGG_STAGES, nn.MaxPool2d(2), num_pools=3)
        self.classifier = DilatedClassifier(1024, num_classes, branches=2)

    def forward(self, image: Tensor) -> Tensor:
        """Map a preprocessed image (B, 3, H, W) to logits (B, num_classes, H, W)."""
        return corner_resize(self.classifier(self.features(image)), image)

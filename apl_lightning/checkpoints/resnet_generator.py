"""The ResNet generator of CycleGAN (Zhu et al., ICCV 2017), which SynSeg-Net uses as its segmenter too."""

from __future__ import annotations

from torch import Tensor, nn

from apl_lightning.checkpoints.raw_image import unit_image


class _Block(nn.Module):
    def __init__(self, width: int, dropout: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        layers += [nn.ReLU(inplace=True)] + ([nn.Dropout(0.5)] if dropout else [])
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv_block(x)
        return y


class ResnetGenerator(nn.Module):
    """Two strided convolutions, residual blocks, two transposed convolutions, with instance norm all along.

    As a generator it gives an image in [-1, 1]; as SynSeg-Net's segmenter (B, C, H, W) class scores, which the official
    code sends through the same Tanh: with 5 classes their softmax never exceeds 0.649.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the translated image, or classes.
        width: Channels of the first layer (`ngf`).
        blocks: Residual blocks.
        dropout: Dropout within the blocks, the default of the official training.
        tanh: End in a Tanh.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 64,
        blocks: int = 9,
        dropout: bool = False,
        tanh: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, width, 7)]
        layers += [nn.InstanceNorm2d(width), nn.ReLU(inplace=True)]
        for n in (width, 2 * width):
            layers += [nn.Conv2d(n, 2 * n, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * n), nn.ReLU(inplace=True)]
        layers += [_Block(4 * width, dropout) for _ in range(blocks)]
        for n in (4 * width, 2 * width):
            up = nn.ConvTranspose2d(n, n // 2, 3, stride=2, padding=1, output_padding=1)
            layers += [up, nn.InstanceNorm2d(n // 2), nn.ReLU(inplace=True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, out_channels, 7)] + ([nn.Tanh()] if tanh else [])
        self.model = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """The translated image or the class scores of a preprocessed image (B, in_channels, H, W)."""
        result: Tensor = self.model(image)
        return result

    def preprocess(self, image: Tensor) -> Tensor:
        """A raw image (see `unit_image`) as this network takes it: in [-1, 1]."""
        return 2 * unit_image(image, self.in_channels) - 1

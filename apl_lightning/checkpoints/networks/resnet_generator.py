"""The ResNet generator of CycleGAN (Zhu et al., ICCV 2017), also the segmentation network of SynSeg-Net."""

from torch import Tensor, nn

from apl_lightning.checkpoints.networks.raw_image import unit_image


def _norm_relu(width: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(width), nn.ReLU(inplace=True)]


class _Block(nn.Module):
    def __init__(self, width: int, dropout: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), *_norm_relu(width)]
        layers += [nn.Dropout(0.5)] if dropout else []
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv_block(x)
        return y


class ResnetGenerator(nn.Module):
    """An encoder, residual blocks and a decoder, all with instance norm.

    As a generator, the network returns an image in [-1, 1]. As SynSeg-Net's segmentation network, it returns logits.
    The official SynSeg-Net also applies Tanh to the logits, which limits the softmax of 5 classes to 0.649.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the translated image, or number of classes.
        width: Channels of the first layer (`ngf`).
        blocks: Number of residual blocks.
        dropout: Apply dropout in the residual blocks, as the official training does by default.
        tanh: Apply Tanh to the output.
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
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, width, 7), *_norm_relu(width)]
        for n in (width, 2 * width):
            layers += [nn.Conv2d(n, 2 * n, 3, stride=2, padding=1), *_norm_relu(2 * n)]
        layers += [_Block(4 * width, dropout) for _ in range(blocks)]
        for n in (4 * width, 2 * width):
            layers += [nn.ConvTranspose2d(n, n // 2, 3, stride=2, padding=1, output_padding=1), *_norm_relu(n // 2)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, out_channels, 7)] + ([nn.Tanh()] if tanh else [])
        self.model = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Map a preprocessed image (B, in_channels, H, W) to (B, out_channels, H, W); H and W are multiples of 4."""
        result: Tensor = self.model(image)
        return result

    def preprocess(self, image: Tensor) -> Tensor:
        """Convert a raw image (C, H, W) or (B, C, H, W), uint8 or floating point in [0, 1], to [-1, 1]."""
        return 2 * unit_image(image, self.in_channels) - 1

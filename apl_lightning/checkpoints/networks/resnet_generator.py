"""The ResNet generator of CycleGAN (Zhu et al., ICCV 2017), also the segmentation network of SynSeg-Net."""

from torch import Tensor, nn

from apl_lightning.checkpoints.networks.raw_image import RawImageNetwork, unit_image


def _norm(width: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if batch_norm else nn.InstanceNorm2d(width)


class _Block(nn.Module):
    def __init__(self, width: int, dropout: bool, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            conv = nn.Conv2d(width, width, 3, bias=not batch_norm)
            layers += [nn.ReflectionPad2d(1), conv, _norm(width, batch_norm), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(0.5)] if dropout else []
        del layers[-2 if dropout else -1 :]  # nothing follows the second norm
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv_block(x)
        return y


class ResnetGenerator(RawImageNetwork, nn.Module):
    """An encoder, residual blocks and a decoder, all with instance norm or all with batch norm.

    As a generator, the network returns an image in [-1, 1]. As SynSeg-Net's segmentation network, it returns logits.
    The official SynSeg-Net also applies Tanh to the logits, which limits the softmax of 5 classes to 0.649.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the translated image, or number of classes.
        width: Channels of the first layer (`ngf`).
        blocks: Number of residual blocks.
        dropout: Apply dropout in the residual blocks, as the official training does by default.
        tanh: Apply Tanh to the output.
        batch_norm: Use batch norm, and no biases before it (`--norm batch` of CycleGAN), instead of instance norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 64,
        blocks: int = 9,
        dropout: bool = False,
        tanh: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        bias = not batch_norm

        def then_norm(conv: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
            return [conv, _norm(conv.out_channels, batch_norm), nn.ReLU(inplace=True)]

        layers: list[nn.Module] = [nn.ReflectionPad2d(3), *then_norm(nn.Conv2d(in_channels, width, 7, bias=bias))]
        for n in (width, 2 * width):
            layers += then_norm(nn.Conv2d(n, 2 * n, 3, stride=2, padding=1, bias=bias))
        layers += [_Block(4 * width, dropout, batch_norm) for _ in range(blocks)]
        for n in (4 * width, 2 * width):
            layers += then_norm(nn.ConvTranspose2d(n, n // 2, 3, 2, padding=1, output_padding=1, bias=bias))
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, out_channels, 7)] + ([nn.Tanh()] if tanh else [])
        self.model = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Map a preprocessed image (B, in_channels, H, W) to (B, out_channels, H, W).

        Raises:
            ValueError: If H or W is not a multiple of 4.
        """
        if image.shape[2] % 4 or image.shape[3] % 4:
            raise ValueError(
                f"Expected the height and width of `image` to be multiples of 4, but got {tuple(image.shape)}: pad it."
            )
        result: Tensor = self.model(image)
        return result

    def preprocess(self, image: Tensor) -> Tensor:
        """Convert a raw image (C, H, W) or (B, C, H, W), uint8 or floating point in [0, 1], to [-1, 1]."""
        return 2 * unit_image(image, self.in_channels) - 1

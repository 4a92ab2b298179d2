"""The segmentation network of SIFA (Chen et al., AAAI 2019 and TMI 2020) and of its PyTorch port."""

from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints.networks.legacy_resize import legacy_resize
from apl_lightning.checkpoints.networks.raw_image import ZScorePreprocess

# TensorFlow's names of the encoder blocks, in order: c convolution, r residual block, d dilated residual block.
ENCODER_BLOCKS = "c1 r1 pool1 r2 pool2 r3 r4 pool3 r5 r6 r7 r8 r9 r10 r11 r12 d1 d2 c2 c3".split()  # noqa: SIM905
# Output channels of each block relative to the first one; 32 if not listed.
_WIDTHS = {"c1": 1, "r1": 1, "r2": 2, "r3": 4, "r4": 4, "r5": 8, "r6": 8}
_WIDTHS |= dict.fromkeys(("r7", "r8", "r9", "r10"), 16)
_WIDEST = 32
_WIDTH, _DROPOUT = 16, 0.25


def _conv(channels: int, width: int, bias: bool, eps: float, kernel: int = 3, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(channels, width, kernel, padding=padding, dilation=dilation, bias=bias)
    return [conv, nn.Dropout(_DROPOUT), nn.BatchNorm2d(width, eps=eps)]


class _Layer(nn.Module):
    """A sequence of modules, named `layer` as in the checkpoints of the PyTorch port."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class _Residual(_Layer):
    """Two convolutions and a shortcut, which is zero-padded if the number of channels increases."""

    def __init__(self, channels: int, width: int, bias: bool, eps: float, dilation: int = 1) -> None:
        first = _conv(channels, width, bias, eps, dilation=dilation)
        super().__init__(*first, nn.ReLU(inplace=True), *_conv(width, width, bias, eps, dilation=dilation))
        self.padding = (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + F.pad(x, (0, 0, 0, 0, self.padding, self.padding)))


class _Encoder(nn.Module):
    """Return the features before the dilated blocks and the final features."""

    def __init__(self, in_channels: int, first: int, bias: bool, eps: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for block in ENCODER_BLOCKS:
            if block.startswith("pool"):
                layers.append(nn.MaxPool2d(2))
                continue
            width = first * _WIDTHS.get(block, _WIDEST)
            if block.startswith("c"):
                kernel = 7 if block == "c1" else 3
                layers.append(_Layer(*_conv(channels, width, bias, eps, kernel), nn.ReLU(inplace=True)))
            else:
                layers.append(_Residual(channels, width, bias, eps, dilation=2 if block.startswith("d") else 1))
            channels = width
        self.model = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        middle = ENCODER_BLOCKS.index("d1")
        lower = self.model[:middle](image)
        return lower, self.model[middle:](lower)


class _Segmenter(nn.Module):
    """A 1 x 1 classifier and bilinear upsampling by 8."""

    def __init__(self, channels: int, num_classes: int, bias: bool, legacy: bool) -> None:
        super().__init__()
        self.legacy = legacy
        self.model = nn.Sequential(_Layer(nn.Conv2d(channels, num_classes, 1, bias=bias)))

    def forward(self, features: Tensor) -> Tensor:
        scores = self.model(features)
        if self.legacy:
            return legacy_resize(scores, 8)
        return F.interpolate(scores, scale_factor=8, mode="bilinear", align_corners=False)


class SIFA(ZScorePreprocess, nn.Module):
    """SIFA's encoder and segmenter for target images, which return logits at the size of the image.

    Version 1 and the PyTorch port return `main`. Version 2 returns `(main, aux)`, where a second segmenter computes
    `aux` from the features before the dilated blocks.

    Args:
        num_classes: Channels of the logits.
        in_channels: 3 in version 1 (three copies of one slice), 1 in version 2 and in the port.
        lower: Add the second segmenter (version 2).
        port: Follow the PyTorch port (biases, eps 1e-5, half-pixel centres) instead of TensorFlow (no biases, eps
            1e-3, `legacy_resize`).
        bounds: The z-scores that `preprocess` maps to -1 and 1. SIFA's data set uses (-1.8, 4.4) for MR and
            (-2.8, 3.2) for CT.
        width: Channels of the first convolution, 16 in SIFA; the last blocks have 32 times as many. Narrower networks
            have less dropout.

    Raises:
        ValueError: If `bounds` are not two increasing numbers.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        lower: bool = False,
        port: bool = False,
        bounds: tuple[float, float] = (-2.8, 3.2),
        width: int = _WIDTH,
    ) -> None:
        super().__init__()
        self.set_bounds(bounds)
        self.in_channels = in_channels
        self.enc = _Encoder(in_channels, width, bias=port, eps=1e-5 if port else 1e-3)
        for module in self.enc.modules():
            if isinstance(module, nn.Dropout):
                module.p *= min(1.0, width / _WIDTH)
        self.seg = _Segmenter(_WIDEST * width, num_classes, bias=port, legacy=not port)
        self.seg_ll = _Segmenter(_WIDEST * width, num_classes, bias=port, legacy=not port) if lower else None

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map a preprocessed image (B, in_channels, H, W) to logits (B, num_classes, H, W).

        Raises:
            ValueError: If H or W is not a multiple of 8.
        """
        if image.shape[2] % 8 or image.shape[3] % 8:
            raise ValueError(
                f"Expected the height and width of `image` to be multiples of 8, but got {tuple(image.shape)}: pad it."
            )
        lower, features = self.enc(image)
        main: Tensor = self.seg(features)
        return main if self.seg_ll is None else (main, self.seg_ll(lower))

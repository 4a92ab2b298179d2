"""SIFA's segmenter (Chen et al., AAAI 2019 and TMI 2020), as in TensorFlow and in the PyTorch port."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints.legacy_resize import legacy_resize
from apl_lightning.checkpoints.raw_image import check_image

# The names of the encoder's blocks in the TensorFlow code, in order: c convolution, r residual, d dilated.
ENCODER_BLOCKS = "c1 r1 pool1 r2 pool2 r3 r4 pool3 r5 r6 r7 r8 r9 r10 r11 r12 d1 d2 c2 c3".split()  # noqa: SIM905
_WIDTHS = {
    "r1": 16,
    "r2": 32,
    "r3": 64,
    "r4": 64,
    "r5": 128,
    "r6": 128,
    **dict.fromkeys(("r7", "r8", "r9", "r10"), 256),
}
_DROPOUT = 0.25


def _convolution(
    channels: int, width: int, bias: bool, eps: float, kernel: int = 3, dilation: int = 1
) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(channels, width, kernel, padding=padding, dilation=dilation, bias=bias)
    return [convolution, nn.Dropout(_DROPOUT), nn.BatchNorm2d(width, eps=eps)]


class _Layer(nn.Module):
    """Convolution, dropout, batch norm and ReLU; the sequence is called `layer` in the port's checkpoints."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class _Residual(_Layer):
    """Two convolutions and a shortcut that widens by zero channels on both sides."""

    def __init__(self, channels: int, width: int, bias: bool, eps: float, dilation: int = 1) -> None:
        first = _convolution(channels, width, bias, eps, dilation=dilation)
        super().__init__(*first, nn.ReLU(inplace=True), *_convolution(width, width, bias, eps, dilation=dilation))
        self.margin = (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + F.pad(x, (0, 0, 0, 0, self.margin, self.margin)))


class _Encoder(nn.Module):
    """Returns the features before the dilated blocks, and the last ones."""

    def __init__(self, in_channels: int, bias: bool, eps: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for block in ENCODER_BLOCKS:
            width = 16 if block == "c1" else _WIDTHS.get(block, 512)
            if block.startswith("pool"):
                layers.append(nn.MaxPool2d(2))
                continue
            if block.startswith("c"):
                kernel = 7 if block == "c1" else 3
                layers.append(_Layer(*_convolution(channels, width, bias, eps, kernel), nn.ReLU(inplace=True)))
            else:
                layers.append(_Residual(channels, width, bias, eps, dilation=2 if block.startswith("d") else 1))
            channels = width
        self.model = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        middle = ENCODER_BLOCKS.index("d1")
        lower = self.model[:middle](image)
        return lower, self.model[middle:](lower)


class _Segmenter(nn.Module):
    """1 x 1 class scores, eight times enlarged."""

    def __init__(self, num_classes: int, bias: bool, legacy: bool) -> None:
        super().__init__()
        self.legacy = legacy
        self.model = nn.Sequential(_Layer(nn.Conv2d(512, num_classes, 1, bias=bias)))

    def forward(self, features: Tensor) -> Tensor:
        scores = self.model(features)
        if self.legacy:
            return legacy_resize(scores, 8)
        return F.interpolate(scores, scale_factor=8, mode="bilinear", align_corners=False)


class SIFA(nn.Module):
    """The encoder and the segmenter that SIFA runs on target images; logits at the size of the image.

    Version 1 (and the PyTorch port) returns `main`. Version 2 returns `(main, aux)`: a second segmenter reads the
    features before the dilated blocks.

    Args:
        num_classes: Channels of the logits.
        in_channels: 3 in version 1 (the same slice three times), 1 in version 2 and in the port.
        lower: Whether the second segmenter exists (version 2).
        port: The conventions of the PyTorch port (biases, eps 1e-5, half-pixel resize) instead of TensorFlow's
            (no biases, eps 1e-3, its legacy resize).
        bounds: The z-scores that become -1 and 1 in `preprocess`. The official data uses (-1.8, 4.4) for MR and
            (-2.8, 3.2) for CT.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        lower: bool = False,
        port: bool = False,
        bounds: tuple[float, float] = (-2.8, 3.2),
    ) -> None:
        super().__init__()
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"Expected `bounds` to be two rising z-scores, but got {bounds}.")
        self.in_channels = in_channels
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.enc = _Encoder(in_channels, bias=port, eps=1e-5 if port else 1e-3)
        self.seg = _Segmenter(num_classes, bias=port, legacy=not port)
        self.seg_ll = _Segmenter(num_classes, bias=port, legacy=not port) if lower else None

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of a preprocessed image (B, in_channels, H, W), H and W multiples of 8.

        Raises:
            ValueError: If the image has another size.
        """
        if image.shape[2] % 8 or image.shape[3] % 8:
            raise ValueError(f"Expected `image` with sides that 8 divides, but got {tuple(image.shape)}: pad it.")
        lower, features = self.enc(image)
        main: Tensor = self.seg(features)
        return main if self.seg_ll is None else (main, self.seg_ll(lower))

    def preprocess(self, image: Tensor) -> Tensor:
        """Raw intensities (C, H, W), or the slices (B, C, H, W) of one volume, as this network takes them.

        The whole tensor is z-scored, then `bounds` are mapped to [-1, 1]: give all slices of a volume at once.
        """
        check_image(image)
        z = image.float()
        z = (z - z.mean()) / z.std(correction=0).clamp(min=1e-8)
        low, high = self.bounds
        scaled = (z - low) / (high - low) * 2 - 1
        return (
            scaled if scaled.shape[-3] == self.in_channels else scaled.expand(*z.shape[:-3], self.in_channels, -1, -1)
        )

"""The networks that each of the seven systems saves, and how to build them from the shapes in a file."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from apl_lightning.checkpoints.networks import (
    DRN,
    SIFA,
    DeepLabV2,
    DeepLabVGG,
    FCN8s,
    ResnetGenerator,
    SIFAGenerator,
    keep_unused,
)
from apl_lightning.checkpoints.networks.deeplab import RESNET101

Shapes = Mapping[str, tuple[int, ...]]
# Far above any real network. Building a network with larger sizes could take forever.
_MAX_SIZE = 2**16


class Network(NamedTuple):
    """A kind of network that a system saves.

    The first dimension of the parameter `head` is the number of output channels. `build` takes it, the shapes in the
    file and those `options` of `load` that the network knows. It does not need the keys with the prefixes (ending in a
    dot) and suffixes in `unused`. A `segmenter` returns logits and not an image.
    """

    title: str
    head: str
    build: Callable[..., nn.Module]
    options: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    segmenter: bool = True


def is_kernel(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor can be the kernel of a 2D convolution."""
    return len(shape) == 4 and all(1 <= size <= _MAX_SIZE for size in shape)


def _kernel(shapes: Shapes, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """The first two sizes of a kernel in a file, or the default, which differs from a wrong shape in the file."""
    shape = shapes.get(name, ())
    return shape[:2] if is_kernel(shape) else default


def _width(shapes: Shapes, first: str, head: str, official: int) -> int:
    """The output channels of the first kernel if the classifier reads 32 times as many, else the official number."""
    width, _ = _kernel(shapes, first, (official, 0))
    _, features = _kernel(shapes, head, (0, 0))
    return width if features == 32 * width else official


def _num_blocks(shapes: Shapes, stage: str) -> int:
    return next(n for n in range(len(shapes) + 1) if f"{stage}.{n}.conv1.weight" not in shapes)


def _deeplab(branches: int, *levels: str) -> Network:
    head = f"{levels[-1]}.conv2d_list.0.weight"

    def build(num_classes: int, shapes: Shapes) -> nn.Module:
        width = _width(shapes, "conv1.weight", head, 64)
        # Fewer blocks at the official width are a damaged file.
        smaller = tuple(_num_blocks(shapes, f"layer{number}") for number in (1, 2, 3, 4))
        return DeepLabV2(num_classes, branches, levels, width, RESNET101 if width == 64 or 0 in smaller else smaller)

    return Network(f"DeepLabv2 ResNet, {'two levels' if len(levels) == 2 else 'one level'}", head, build)


def _drn(title: str, *blocks: int) -> Network:
    def build(num_classes: int, shapes: Shapes) -> nn.Module:
        return DRN(num_classes, blocks, _width(shapes, "conv1.weight", "fc.weight", 16))

    return Network(title, "fc.weight", build)


def _generator(title: str, blocks: int, segmenter: bool, options: tuple[str, ...] = ()) -> Network:
    def build(channels: int, shapes: Shapes, **options: Any) -> nn.Module:
        width, in_channels = _kernel(shapes, "model.1.weight", (64, 1))
        dropout = any(name.endswith(".conv_block.6.weight") and len(shapes[name]) == 4 for name in shapes)
        batch_norm = "model.2.weight" in shapes
        return ResnetGenerator(in_channels, channels, width, blocks, dropout, batch_norm=batch_norm, **options)

    # torch < 0.4 saved running statistics of instance norms, which were not used.
    unused = ("running_mean", "running_var", "num_batches_tracked")
    return Network(f"{title}, {blocks} blocks", f"model.{17 + blocks}.weight", build, options, unused, segmenter)


def _sifa(title: str, unused: tuple[str, ...], lower: bool = False, port: bool = False) -> Network:
    first, head = "enc.model.0.layer.0.weight", "seg.model.0.layer.0.weight"

    def build(num_classes: int, shapes: Shapes, **options: Any) -> nn.Module:
        width, in_channels = _width(shapes, first, head, 16), _kernel(shapes, first, (16, 1))[1]
        network = SIFA(num_classes, in_channels, lower, port, width=width, **options)
        if port:
            keep_unused(network, {k: shape for k, shape in shapes.items() if k.startswith(_PORT_OTHERS)})
        return network

    return Network(title, head, build, ("bounds",) if port else ("bounds", "part"), unused)


def _sifa_generator(_channels: int, shapes: Shapes, **options: Any) -> nn.Module:
    width, in_channels = _kernel(shapes, "c1.conv.weight", (32, 1))
    return SIFAGenerator(in_channels, width=width, **options)


_G_A = Network("SIFA generator g_A", "c6.weight", _sifa_generator, ("bounds", "part"), segmenter=False)
_PORT_OTHERS = ("gen.", "dec.", "disA.", "disB.", "disSeg.")
_SEGMENTER = "ResNet generator as segmenter"

SYSTEMS: dict[str, tuple[Network, ...]] = {
    "advent": (_deeplab(4, "layer5", "layer6"), _deeplab(4, "layer6")),
    "adaptsegnet": (
        _deeplab(2, "layer5", "layer6"),
        _deeplab(2, "layer5"),
        Network("DeepLab VGG-16", "classifier.conv2d_list.0.weight", lambda n, _: DeepLabVGG(n)),
    ),
    "cycada": (
        _drn("DRN-26", 1, 1, 2, 2, 2, 2, 1, 1),
        _drn("DRN-42", 1, 1, 3, 4, 6, 3, 1, 1),
        Network("FCN-8s VGG-16", "vgg_head.6.weight", lambda n, _: FCN8s(n)),
    ),
    "synseg": tuple(_generator(_SEGMENTER, n, segmenter=True, options=("tanh",)) for n in (9, 6)),
    "cyclegan": tuple(_generator("ResNet generator", n, segmenter=False) for n in (9, 6)),
    "sifa-v1": (_sifa("SIFA-v1 segmenter", ("g_A.",)), _G_A),
    "sifa-v2": (_sifa("SIFA-v2 segmenter", ("g_A.",), lower=True), _G_A),
    "sifa-pytorch": (_sifa("SIFA-v1 segmenter, PyTorch port", (), port=True),),
}


def unsupported(names: Iterable[str]) -> str:
    """Name a network that a system saves but `load` does not build; an empty string if there is none."""
    if any(name.endswith("model.model.1.model.3.model.1.weight") for name in names):
        return (
            "a U-Net generator of CycleGAN, which is not supported: build it with CycleGAN's own code and pass it to "
            "`Translated`, or train with --netG resnet_9blocks"
        )
    return ""

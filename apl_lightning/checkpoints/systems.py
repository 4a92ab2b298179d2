"""Which networks each of the seven systems saves, and how to build one from the shapes in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from apl_lightning.checkpoints.deeplab import DeepLabV2, DeepLabVGG
from apl_lightning.checkpoints.drn import DRN
from apl_lightning.checkpoints.fcn8s import FCN8s
from apl_lightning.checkpoints.resnet_generator import ResnetGenerator
from apl_lightning.checkpoints.sifa import SIFA
from apl_lightning.checkpoints.sifa_generator import SIFAGenerator

Shapes = Mapping[str, tuple[int, ...]]


class Network(NamedTuple):
    """One kind of network that a system saves.

    Attributes:
        title: What to call it.
        head: The parameter whose first dimension is the number of classes.
        build: Makes the network from the shapes in the file and the options of `load`.
        options: The options of `load` that it knows.
        unused: Endings of names, or beginnings with a dot behind, that may be left over.
        segmenter: Whether its output is class scores (and not an image).
    """

    title: str
    head: str
    build: Callable[..., nn.Module]
    options: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    segmenter: bool = True


def _deeplab(branches: int, levels: tuple[str, ...]) -> Callable[..., nn.Module]:
    head = f"{levels[-1]}.conv2d_list.0.weight"
    return lambda shapes: DeepLabV2(shapes[head][0], branches, levels)


def _drn(blocks: tuple[int, ...]) -> Callable[..., nn.Module]:
    return lambda shapes: DRN(shapes["fc.weight"][0], blocks)


def _generators(title: str, segmenter: bool, options: tuple[str, ...] = ()) -> tuple[Network, ...]:
    """The ResNet generators of 9 and of 6 blocks."""
    unused = ("running_mean", "running_var", "num_batches_tracked")
    return tuple(
        Network(f"{title}, {n} blocks", _generator_head(n), _generator(n), options, unused, segmenter) for n in (9, 6)
    )


def _generator_head(blocks: int) -> str:
    return f"model.{17 + blocks}.weight"


def _generator(blocks: int) -> Callable[..., nn.Module]:
    def build(shapes: Shapes, **options: Any) -> nn.Module:
        width, channels = shapes.get("model.1.weight", (64, 1))[:2]
        dropout = any(".conv_block.6.weight" in name for name in shapes)
        return ResnetGenerator(channels, shapes[_generator_head(blocks)][0], width, blocks, dropout, **options)

    return build


def _sifa(lower: bool, port: bool = False) -> Callable[..., nn.Module]:
    def build(shapes: Shapes, **options: Any) -> nn.Module:
        channels = shapes.get("enc.model.0.layer.0.weight", (16, 1))[1]
        return SIFA(shapes["seg.model.0.layer.0.weight"][0], channels, lower, port, **options)

    return build


def _sifa_generator(shapes: Shapes) -> nn.Module:
    return SIFAGenerator(shapes.get("c1.conv.weight", (32, 1))[1])


_TWO_LEVELS, _SIFA_HEAD = ("layer5", "layer6"), "seg.model.0.layer.0.weight"
_G_A = Network("SIFA's generator g_A", "c6.weight", _sifa_generator, ("part",), segmenter=False)

SYSTEMS: dict[str, tuple[Network, ...]] = {
    "advent": (
        Network("DeepLabv2 ResNet-101, two levels", "layer6.conv2d_list.0.weight", _deeplab(4, _TWO_LEVELS)),
        Network("DeepLabv2 ResNet-101, one level", "layer6.conv2d_list.0.weight", _deeplab(4, ("layer6",))),
    ),
    "adaptsegnet": (
        Network("DeepLabv2 ResNet-101, two levels", "layer6.conv2d_list.0.weight", _deeplab(2, _TWO_LEVELS)),
        Network("DeepLabv2 ResNet-101, one level", "layer5.conv2d_list.0.weight", _deeplab(2, ("layer5",))),
        Network(
            "DeepLab VGG-16",
            "classifier.conv2d_list.0.weight",
            lambda shapes: DeepLabVGG(shapes["classifier.conv2d_list.0.weight"][0]),
        ),
    ),
    "cycada": (
        Network("DRN-26", "fc.weight", _drn((1, 1, 2, 2, 2, 2, 1, 1))),
        Network("DRN-42", "fc.weight", _drn((1, 1, 3, 4, 6, 3, 1, 1))),
        Network("FCN-8s VGG-16", "vgg_head.6.weight", lambda shapes: FCN8s(shapes["vgg_head.6.weight"][0])),
    ),
    "synseg": _generators("ResNet generator as a segmenter", segmenter=True, options=("tanh",)),
    "cyclegan": _generators("ResNet generator", segmenter=False),
    "sifa-v1": (Network("SIFA-v1 segmenter", _SIFA_HEAD, _sifa(lower=False), ("bounds", "part"), ("g_A.",)), _G_A),
    "sifa-v2": (Network("SIFA-v2 segmenter", _SIFA_HEAD, _sifa(lower=True), ("bounds", "part"), ("g_A.",)), _G_A),
    "sifa-pytorch": (
        Network(
            "SIFA-v1 segmenter, PyTorch port",
            _SIFA_HEAD,
            _sifa(lower=False, port=True),
            ("bounds",),
            ("gen.", "dec.", "disA.", "disB.", "disSeg."),
        ),
    ),
}

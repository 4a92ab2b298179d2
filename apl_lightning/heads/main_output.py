"""The main logit map among the outputs of a network."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating, trainable
from apl_lightning.heads.gradients import gradients_of
from apl_lightning.heads.outputs import (
    channels_of,
    explain_wrong_classes,
    logit_maps,
    shapes_of,
    within_unit_interval,
)


class LogitMaps(NamedTuple):
    """The logit maps of an output, their channels, and the index of the main one."""

    maps: list[Tensor]
    channels: int
    main: int


def select_main_output(
    network: nn.Module,
    output: object,
    num_classes: int,
    shape: tuple[int, ...],
    main_output: int | None,
    example: Callable[[], Tensor],
) -> LogitMaps:
    """The logit map at index `main_output` of what a network returns, or the main one if `None`.

    The main one is the one that depends on most parameters, the first among equals: an auxiliary output leaves the
    network early, so it depends on fewer (ADVENT returns it first, torchvision last). Probabilities depend on as many
    as their logits, and come after them.

    Args:
        network: The network.
        output: What it returns for images of this `shape`.
        num_classes: The number of classes, background included.
        shape: (B, C, *S).
        main_output: The index of the map.
        example: A batch that is small enough for gradients, to choose from several maps.

    Raises:
        ValueError: If there are no logits of `num_classes` classes, or not so many maps.
    """
    channels = channels_of(output, num_classes, selected=main_output is not None)
    maps = logit_maps(output, channels)
    if not maps:
        raise ValueError(explain_wrong_classes(output, num_classes, shape))
    if main_output is None:
        main_output = 0 if len(maps) == 1 else _find(network, channels, example())
    if not 0 <= main_output < len(maps):
        raise ValueError(
            f"Expected `main_output` at least 0 and below {len(maps)}, the number of logit maps in "
            f"{shapes_of(output)}, but got {main_output}."
        )
    return LogitMaps(maps, channels, main_output)


def _find(network: nn.Module, channels: int, example: Tensor) -> int:
    with trainable(network), evaluating(network):
        maps = logit_maps(network(example), channels)
        sizes = [_reached(m, [p for p in network.parameters() if p.requires_grad]) for m in maps]
    return max(range(len(maps)), key=lambda index: (sizes[index], not within_unit_interval(maps[index])))


def _reached(logits: Tensor, parameters: list[nn.Parameter]) -> int:
    """The parameters that logits depend on."""
    gradients = gradients_of(logits.sum(), parameters)
    return sum(p.numel() for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None)

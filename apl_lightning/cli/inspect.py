"""What a checkpoint contains, and where the classifier of a network is."""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from apl_lightning.checkpoints import identify
from apl_lightning.folders import network_of_yaml
from apl_lightning.heads import DualHeadModel, add_dual_heads, example_input


def inspect(what: nn.Module | str | Path, num_classes: int | None = None, size: Sequence[int] | None = None) -> None:
    """Describe a checkpoint (its system, classes and keys), or a network (its classifier and its heads).

    Args:
        what: A checkpoint, or a network, or a YAML file with its `class_path` and `init_args`.
        num_classes: The number of classes of a network, background included.
        size: The spatial size of images for a network; by default one that it accepts.
    """
    what = network_of_yaml(what)
    sys.stdout.write((_describe(what, num_classes, size) if isinstance(what, nn.Module) else identify(what)) + "\n")


def _describe(network: nn.Module, num_classes: int | None, size: Sequence[int] | None) -> str:
    if isinstance(network, DualHeadModel):
        model = network
    elif num_classes is None:
        raise ValueError("Expected the number of classes of the network, but got none: pass `num_classes`.")
    else:
        model = add_dual_heads(network, num_classes, example=None if size is None else example_input(network, size))
    head = model.network.get_submodule(model.head)
    encoder, heads = (
        sum(p.numel() for p in parameters) for parameters in (model.encoder_parameters(), model.head_parameters())
    )
    return "\n".join(
        [
            f"{type(model.network).__name__}: the classifier is {model.head!r}, {head}",
            f"  second head: {'one of the network' if model.second is None else 'added'}",
            f"  parameters: {encoder:,} of the encoder, {heads:,} of both heads",
        ]
    )

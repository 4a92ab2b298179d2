"""What a run of a network on an example shows: its logit maps, the main one, and the classifier behind it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating, not_finite
from apl_lightning.heads.find_classifier import (
    convolution_dimensions,
    example_input,
    explains,
    find_classifier,
)
from apl_lightning.heads.main_output import select_main_output
from apl_lightning.heads.outputs import shapes_of


class Trial(NamedTuple):
    """A network that has run on an example; it may keep something from that run."""

    network: nn.Module
    example: Tensor
    channels: int
    shapes: str
    maps: list[Tensor]
    main_output: int
    head: str

    @property
    def plain(self) -> Tensor:
        """The main logits."""
        return self.maps[self.main_output]

    def others(self) -> list[int]:
        """The outputs that have a classifier of their own; probabilities, say, have that of their logits."""
        others = (output for output in range(len(self.maps)) if output != self.main_output)
        return [i for i in others if not explains(self.network, self.head, self.channels, self.example, i)]


def run_trial(
    network: nn.Module, num_classes: int, example: Tensor | None, main_output: int | None, head: str | None
) -> Trial:
    """Run a network on an example, which is made if `None`, and find what is not given.

    Raises:
        HeadNotFoundError: If no single module explains the output.
        ValueError: If the network returns no logits of `num_classes` classes, or none that are finite.
    """
    name = type(network).__name__
    example = example_input(network) if example is None else example
    if convolution_dimensions(network) == {example.ndim - 1}:  # they take an image without a batch too
        raise ValueError(
            f"Expected `example` to be a batch (B, C, *S), but got {tuple(example.shape)}: pass image[None]."
        )
    with evaluating(network), torch.no_grad():
        output = network(example)
    maps, channels, main = select_main_output(
        network, output, num_classes, tuple(example.shape), main_output, lambda: example
    )
    if not maps[main].isfinite().all():
        broken = not_finite(network.state_dict())
        cause = f"{broken[0]!r} has NaN or infinity: load other weights" if broken else "pass images as `example`"
        raise ValueError(f"Expected finite logits, but {name} returns NaN or infinity for the example: {cause}.")
    head = find_classifier(network, channels, example, main) if head is None else head
    trial = Trial(network, example, channels, shapes_of(output), maps, main, head)
    if channels == 1 and main_output is None and trial.others():
        raise ValueError(
            f"Expected one logit for the foreground of two classes, but {name} returns {trial.shapes}, which may be "
            "those of several labels: pass `main_output`, the index of one of them."
        )
    return trial

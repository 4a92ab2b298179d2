"""Hooks that compute both heads on the features that pass a classifier, and decide where gradients go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Route:
    """Hooks on a classifier that compute its sibling too and decide where gradients go.

    An object rather than a closure, so that deepcopy and pickle carry it along.
    """

    def __init__(self, sibling: nn.Module | None) -> None:
        self.sibling = sibling
        self.routed = False
        self._features: tuple[Any, ...] = ()
        self._inside = False

    def install(self, classifier: nn.Module) -> list[Any]:
        """Put the hooks on a classifier; returns their handles."""
        return [classifier.register_forward_pre_hook(self.before), classifier.register_forward_hook(self.after)]

    def before(self, _classifier: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep the features for the encoder's loss; the classifier itself sees them detached."""
        if not self.routed or self._inside:
            return None
        self._features = inputs
        arguments: tuple[Any, ...] = detached(inputs)
        return arguments

    def after(self, classifier: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Join main, aux and, where routed, both once more as constant functions of the features: (k B, C, *S)."""
        if self._inside:
            return output
        logits = [output]
        if self.sibling is not None:
            logits.append(self.sibling(*inputs))
        if self.routed:
            arguments, self._features = self._features, ()
            self._inside = True
            try:
                logits += [frozen(head, arguments) for head in (classifier, self.sibling) if head is not None]
            finally:
                self._inside = False
        return torch.cat(logits) if len(logits) > 1 else output


class Tap:
    """A hook that keeps the features of a layer until the second head reads them."""

    def __init__(self) -> None:
        self.features: Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the output of the layer."""
        self.features = output

    def take(self) -> Tensor:
        """The features of the last forward pass, once."""
        features, self.features = self.features, None
        assert features is not None, "the tapped layer was called when the heads were added"
        return features


def detached(value: Any) -> Any:
    """The value with every tensor in it detached, whatever nest of tuples, lists and dicts holds it."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(detached(item) for item in value)
    return value


def frozen(head: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    """The head as a constant function: gradients pass through it, none stays in it, and its buffers do not move."""
    state = {name: parameter.detach() for name, parameter in head.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in head.named_buffers()}
    logits: Tensor = functional_call(head, state, arguments)
    return logits


def both_ways(head: nn.Module, features: Tensor, routed: bool) -> list[Tensor]:
    """The logits of a head; routed, once to train the head and once to train what made the features."""
    return [head(features.detach()), frozen(head, (features,))] if routed else [head(features)]

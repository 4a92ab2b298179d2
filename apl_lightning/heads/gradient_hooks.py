"""Hooks on a classifier that compute both heads on its features and route the gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class GradientHooks:
    """Hooks on a classifier that also run its sibling and, if `routed`, separate the gradients of the two losses.

    An object and not a closure, so that deepcopy and pickle copy it.
    """

    def __init__(self, sibling: nn.Module | None) -> None:
        self.sibling = sibling
        self.routed = False
        self._features: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._inside = False

    def install(self, classifier: nn.Module) -> list[Any]:
        """Register the hooks on a classifier; returns their handles."""
        before = classifier.register_forward_pre_hook(self.before, with_kwargs=True)
        return [before, classifier.register_forward_hook(self.after, with_kwargs=True)]

    def before(
        self, _classifier: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the features for the encoder's loss, and give them to the classifier detached."""
        if not self.routed or self._inside:
            return None
        self._features = inputs, options
        return detached(inputs), detached(options)

    def after(self, classifier: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Tensor:
        """Join main and aux logits along the batch and, if routed, both again with constant heads: (k B, C, *S)."""
        if self._inside:
            return output
        logits = [output]
        if self.sibling is not None:
            logits.append(self.sibling(*inputs, **options))
        if self.routed:
            features, self._features = self._features, ((), {})
            self._inside = True
            try:
                logits += [run_constant(head, *features) for head in (classifier, self.sibling) if head is not None]
            finally:
                self._inside = False
        return torch.cat(logits) if len(logits) > 1 else output


class FeatureTap:
    """A forward hook that keeps the output of a layer until the second head reads it."""

    def __init__(self) -> None:
        self.features: Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the output of the layer."""
        self.features = output

    def take(self) -> Tensor:
        """Return the features of the last forward pass and forget them."""
        features, self.features = self.features, None
        assert features is not None, "`add_dual_heads` has checked that the layer runs in a forward pass"
        return features


def detached(value: Any) -> Any:
    """The value with all tensors detached, in any nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(detached(item) for item in value)
    return value


def run_constant(head: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> Tensor:
    """The head as a constant function: gradients pass through it, and its parameters and buffers do not change."""
    state = {name: parameter.detach() for name, parameter in head.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in head.named_buffers()}
    logits: Tensor = functional_call(head, state, arguments, options)
    return logits

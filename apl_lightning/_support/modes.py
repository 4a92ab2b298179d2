"""Modes, hooks and state of a network for the length of a block, and whether its weights are finite."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

_STOCHASTIC_DEPTH = ("DropPath", "StochasticDepth")  # of timm, Hugging Face and MONAI; of torchvision


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule returns to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unfixed_modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a network but those that are `is_fixed`, such as the generator of `Translated`, and theirs."""
    fixed = {part for module in model.modules() if getattr(module, "is_fixed", False) for part in module.modules()}
    return [module for module in model.modules() if module not in fixed]


def set_dropout_mode(model: nn.Module, active: bool) -> None:
    """Put all layers of a network with dropout or stochastic depth in training or evaluation mode."""
    for module in unfixed_modules(model):
        if isinstance(module, _DropoutNd | nn.MultiheadAttention) or type(module).__name__.endswith(_STOCHASTIC_DEPTH):
            module.train(active)


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Gradients for all parameters but integers; afterwards as before."""
    with _requires_grad(model, True), torch.enable_grad():
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients for no parameter, so that no graph is kept for them; afterwards as before."""
    with _requires_grad(model, False):
        yield


@contextmanager
def _requires_grad(model: nn.Module, value: bool) -> Iterator[None]:
    changed = [p for p in model.parameters() if p.requires_grad != value and p.is_floating_point()]
    for parameter in changed:
        parameter.requires_grad_(value)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not value)


@contextmanager
def hooked(
    *modules: nn.Module,
    pre: Callable[..., Any] | None = None,
    post: Callable[..., Any] | None = None,
    with_kwargs: bool = False,
) -> Iterator[None]:
    """Forward pre-hooks (which see keyword arguments on request) and hooks on some modules, removed afterwards."""
    handles = [module.register_forward_pre_hook(pre, with_kwargs=with_kwargs) for module in modules if pre is not None]
    handles += [module.register_forward_hook(post) for module in modules if post is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """The names of the tensors of a state dict with NaN or infinity; minus infinity may be a mask of attention."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return [name for name, value in tensors.items() if bool(((value != value) | (value == math.inf)).any())]


@contextmanager
def restored_on_error(module: nn.Module) -> Iterator[None]:
    """A block that leaves the state of a module as it was if it fails."""
    before = copy.deepcopy(module.state_dict())
    try:
        yield
    except BaseException:
        module.load_state_dict(before)
        raise

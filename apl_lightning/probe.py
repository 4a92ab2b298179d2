"""Find out by running it what a network takes, what it returns and where its classifier is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning.outputs import logit_maps

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SIZES = {1: (64, 128, 256), 2: (64, 128, 224, 256, 96, 512), 3: (32, 64, 96, 128)}


class HeadNotFoundError(ValueError):
    """No part of the network turns features into class scores on its own."""


def example_input(model: nn.Module) -> Tensor:
    """An input that `model` accepts: two images of noise with the channels of its first convolution.

    Raises:
        ValueError: If the network has no convolution, or accepts none of the usual sizes.
    """
    first = next((module for module in model.modules() if isinstance(module, _CONVOLUTIONS)), None)
    if first is None:
        raise ValueError(
            f"Expected `model` to hold a convolution that tells its input channels, but {type(model).__name__} "
            "has none: pass `example`, a batch that the network accepts."
        )
    dimensions = len(first.kernel_size)
    weight, channels = first.weight, first.in_channels
    generator = torch.Generator().manual_seed(0)
    for size in _SIZES[dimensions]:
        noise = torch.randn(2, channels, *[size] * dimensions, generator=generator)
        example = noise.to(device=weight.device, dtype=weight.dtype)
        try:
            with evaluating(model), torch.no_grad():
                model(example)
        except Exception as error:  # whatever a network raises about a size is its own business
            failure = f"{type(error).__name__}: {error}"
        else:
            return example
    raise ValueError(
        f"Expected `model` to accept images of shape (2, {channels}, {', '.join(['S'] * dimensions)}) with S one of "
        f"{sorted(_SIZES[dimensions])}, but {type(model).__name__} raised {failure}: pass `example`, a batch that the "
        "network accepts."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """All parameters take gradients inside; afterwards as before."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@dataclass
class _Call:
    """How one module was used in one forward pass of the network."""

    count: int = 0
    channels_in: int | None = None
    channels_out: int | None = None


def find_classifier(model: nn.Module, num_classes: int, example: Tensor, output: int = 0) -> str:
    """Name the module that turns features into the class scores of one of the network's outputs.

    It is the smallest module that is called once, returns `num_classes` channels from another number of them, and
    on which alone the output depends: with the module's result held constant, no other parameter gets a gradient.

    Args:
        model: Any segmentation network.
        num_classes: Channels of the logits.
        example: A batch that the network accepts, (B, C, *S).
        output: Which of the network's logit maps to explain.

    Returns:
        The dotted path of the module.

    Raises:
        HeadNotFoundError: If there is no such module.
    """
    modules = dict(model.named_modules())
    calls = _record_calls(modules, model, example)

    def size(name: str) -> int:
        return sum(parameter.numel() for parameter in modules[name].parameters())

    candidates = [name for name, call in calls.items() if name and call.count == 1 and call.channels_out == num_classes]
    candidates.sort(key=lambda name: (size(name), -name.count(".")))
    # A module that maps C channels to C is most likely a refinement behind the classifier (MONAI's last residual
    # unit); only a leaf, in a network whose features happen to have C channels, is a classifier.
    heads = [name for name in candidates if calls[name].channels_in != num_classes and 2 * size(name) <= size("")]
    leaves = [name for name in candidates if name not in heads and not list(modules[name].children())]
    for name in heads + leaves:
        if _explains(modules[name], model, num_classes, example, output):
            return name
    shared = [name for name, call in calls.items() if name and call.count > 1 and call.channels_out == num_classes]
    if shared:
        cause = f"{shared[0]!r} is called {calls[shared[0]].count} times, and its results are joined"
        cure = "such a shared predictor cannot be given a sibling; choose an output with a classifier of its own"
    else:
        cause = "found none"
        cure = "pass `head`, the dotted path of its classifier (see `model.named_modules()`)"
    raise HeadNotFoundError(
        f"Expected `model` to end in one module that turns features into {num_classes} class scores, but in "
        f"{type(model).__name__} {cause}: {cure}."
    )


def _record_calls(modules: dict[str, nn.Module], model: nn.Module, example: Tensor) -> dict[str, _Call]:
    calls = {name: _Call() for name, module in modules.items() if any(True for _ in module.parameters())}

    def recorder(call: _Call) -> Callable[..., None]:
        def record(_module: nn.Module, inputs: tuple[Any, ...], result: object) -> None:
            call.count += 1
            call.channels_in = _channels(inputs[0]) if inputs else None
            call.channels_out = _channels(result)

        return record

    handles = [modules[name].register_forward_hook(recorder(call)) for name, call in calls.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _channels(value: object) -> int | None:
    return value.shape[1] if isinstance(value, Tensor) and value.ndim >= 3 else None


def _explains(module: nn.Module, model: nn.Module, num_classes: int, example: Tensor, output: int) -> bool:
    """Whether the output depends on nothing but `module`: held constant, it leaves no gradient to anything else."""
    handle = module.register_forward_hook(lambda _module, _inputs, result: result.detach())
    try:
        with trainable(model), evaluating(model):
            return not logit_maps(model(example), num_classes)[output].requires_grad
    finally:
        handle.remove()


def find_main_output(model: nn.Module, num_classes: int, example: Tensor) -> int:
    """Which of the network's logit maps is the main one: the one that most parameters act on, the first among equals.

    An auxiliary output leaves the network early, so less of it takes part: ADVENT returns it first, torchvision last.
    """
    parameters = list(model.parameters())
    with trainable(model), evaluating(model):
        maps = logit_maps(model(example), num_classes)
        acting = [torch.autograd.grad(m.sum(), parameters, retain_graph=True, allow_unused=True) for m in maps]
    sizes = [sum(p.numel() for p, g in zip(parameters, grads, strict=True) if g is not None) for grads in acting]
    return sizes.index(max(sizes))

"""Find the classifier of a network by running it on an example."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating, hooked, trainable
from apl_lightning.heads.outputs import logit_maps

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SIZES = {1: (64, 128, 256), 2: (64, 128, 224, 256, 96, 512), 3: (32, 64, 96, 128)}


class HeadNotFoundError(ValueError):
    """No single module of the network turns features into class scores."""


def example_input(model: nn.Module) -> Tensor:
    """Two images of noise that `model` accepts, with the channels of its first convolution; or a `ValueError`."""
    first = next((module for module in model.modules() if isinstance(module, _CONVOLUTIONS)), None)
    if first is None:
        raise ValueError(
            f"Expected `model` to have a convolution that shows its input channels, but {type(model).__name__} "
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
        except Exception as error:  # a network may raise anything about a size
            failure = f"{type(error).__name__}: {error}"
        else:
            return example
    raise ValueError(
        f"Expected `model` to accept images of shape (2, {channels}, {', '.join(['S'] * dimensions)}) with S one of "
        f"{sorted(_SIZES[dimensions])}, but {type(model).__name__} raised {failure}: pass `example`, a batch that the "
        "network accepts."
    )


class _Call(NamedTuple):
    """How one module is used in one forward pass of the network."""

    times: int = 0
    channels_in: int | None = None
    channels_out: int | None = None


def find_classifier(model: nn.Module, num_classes: int, example: Tensor, output: int = 0) -> str:
    """The dotted path of the module that turns features into the class scores of a logit map of the network.

    It is the smallest module that is called once, returns `num_classes` channels from another number of channels, and
    on which alone the output depends: if its result is held constant, no other parameter gets a gradient.

    Raises:
        HeadNotFoundError: If there is no such module.
    """
    modules = dict(model.named_modules())
    calls = _record_calls(modules, model, example)

    def size(name: str) -> int:
        return sum(parameter.numel() for parameter in modules[name].parameters())

    candidates = [name for name, call in calls.items() if name and call.times == 1 and call.channels_out == num_classes]
    candidates.sort(key=lambda name: (size(name), -name.count(".")))
    # A module that maps C channels to C is most likely a refinement behind the classifier (MONAI's last residual
    # unit); only a leaf, in a network whose features happen to have C channels, is a classifier.
    heads = [name for name in candidates if calls[name].channels_in != num_classes and 2 * size(name) <= size("")]
    leaves = [name for name in candidates if name not in heads and not list(modules[name].children())]
    for name in heads + leaves:
        if _explains(modules[name], model, num_classes, example, output):
            return name
    shared = [name for name, call in calls.items() if name and call.times > 1 and call.channels_out == num_classes]
    if shared:
        cause = f"{shared[0]!r} is called {calls[shared[0]].times} times, and its results are joined"
        cure = "pass `main_output` of an output that has its own classifier"
    else:
        cause = "found none"
        cure = "pass `head`, the dotted path of its classifier (see `model.named_modules()`)"
    raise HeadNotFoundError(
        f"Expected `model` to end in one module that turns features into {num_classes} class scores, but in "
        f"{type(model).__name__} {cause}: {cure}."
    )


def find_main_output(model: nn.Module, num_classes: int, example: Tensor) -> int:
    """The index of the main logit map: the one that depends on most parameters, the first among equals.

    An auxiliary output leaves the network early, so it depends on fewer: ADVENT returns it first, torchvision last.
    """
    parameters = list(model.parameters())
    with trainable(model), evaluating(model):
        maps = logit_maps(model(example), num_classes)
        gradients = [torch.autograd.grad(m.sum(), parameters, retain_graph=True, allow_unused=True) for m in maps]
    sizes = [sum(p.numel() for p, g in zip(parameters, grads, strict=True) if g is not None) for grads in gradients]
    return sizes.index(max(sizes))


def _record_calls(modules: dict[str, nn.Module], model: nn.Module, example: Tensor) -> dict[str, _Call]:
    calls = {module: _Call() for module in modules.values() if any(True for _ in module.parameters())}

    def record(module: nn.Module, inputs: tuple[Any, ...], result: object) -> None:
        channels_in = _channels(inputs[0]) if inputs else None
        calls[module] = _Call(calls[module].times + 1, channels_in, _channels(result))

    with hooked(*calls, post=record), evaluating(model), torch.no_grad():
        model(example)
    return {name: calls[module] for name, module in modules.items() if module in calls}


def _channels(value: object) -> int | None:
    return value.shape[1] if isinstance(value, Tensor) and value.ndim >= 3 else None


def _explains(module: nn.Module, model: nn.Module, num_classes: int, example: Tensor, output: int) -> bool:
    """Whether the output depends on `module` alone: with a constant result of it, nothing else gets a gradient."""
    constant = hooked(module, post=lambda _module, _inputs, result: result.detach())
    with constant, trainable(model), evaluating(model):
        return not logit_maps(model(example), num_classes)[output].requires_grad

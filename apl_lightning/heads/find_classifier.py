"""Find the classifier of a network by running it on an example."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating, hooked, trainable
from apl_lightning.heads.gradient_hooks import detached
from apl_lightning.heads.outputs import logit_maps

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SIZES = {1: (64, 128, 256), 2: (64, 128, 224, 256, 96, 512), 3: (32, 64, 96, 128)}


class HeadNotFoundError(ValueError):
    """No single module of the network turns features into class scores."""


def example_input(model: nn.Module, size: Sequence[int] | None = None) -> Tensor:
    """Two images of noise that `model` accepts, with the channels of its first convolution; or a `ValueError`.

    Without a spatial `size`, it is the first one of a few that the network accepts.
    """
    first = next((module for module in model.modules() if isinstance(module, _CONVOLUTIONS)), None)
    if first is None:
        raise ValueError(
            f"Expected `model` to have a convolution that shows its input channels, but {type(model).__name__} "
            "has none: pass `example`, a batch that the network accepts."
        )
    dimensions = len(first.kernel_size)
    weight, channels = first.weight, first.in_channels
    generator = torch.Generator().manual_seed(0)
    for tried in [[extent] * dimensions for extent in _SIZES[dimensions]] if size is None else [size]:
        noise = torch.randn(2, channels, *tried, generator=generator)
        example = noise.to(device=weight.device, dtype=weight.dtype)
        try:
            with evaluating(model), torch.no_grad():
                model(example)
        except Exception as error:  # a network may raise anything about a size
            failure = f"{type(error).__name__}: {error}"
        else:
            return example
    shape = f"(2, {channels}, {', '.join(str(extent) for extent in size or 'S' * dimensions)})"
    cure = "another `size`"
    if size is None:
        shape += f" with S one of {sorted(_SIZES[dimensions])}"
        cure = "`example`, a batch that the network accepts, or to a command `size`"
    raise ValueError(
        f"Expected `model` to accept images of shape {shape}, but {type(model).__name__} raised {failure}: pass {cure}."
    )


def convolution_dimensions(model: nn.Module) -> set[int]:
    """The numbers of spatial dimensions that the convolutions of a network have."""
    return {len(module.kernel_size) for module in model.modules() if isinstance(module, _CONVOLUTIONS)}


class _Call(NamedTuple):
    """How one module is used in one forward pass of the network."""

    times: int = 0
    channels_in: int | None = None
    channels_out: int | None = None


def find_classifier(model: nn.Module, channels: int, example: Tensor, output: int = 0) -> str:
    """The dotted path of the module that turns features into the class scores of a logit map of the network.

    It is the smallest module that is called once, returns `channels` channels from another number of channels, and on
    which alone the output depends.

    Raises:
        HeadNotFoundError: If there is no such module.
    """
    modules = dict(model.named_modules())
    calls = _record_calls(modules, model, example)

    def size(name: str) -> int:
        return sum(parameter.numel() for parameter in modules[name].parameters())

    candidates = [name for name, call in calls.items() if name and call.times == 1 and call.channels_out == channels]
    candidates.sort(key=lambda name: (size(name), -name.count(".")))
    # A module that maps C channels to C is most likely a refinement behind the classifier (MONAI's last residual
    # unit); only a leaf, in a network whose features happen to have C channels, is a classifier.
    heads = [name for name in candidates if calls[name].channels_in != channels and 2 * size(name) <= size("")]
    leaves = [name for name in candidates if name not in heads and not list(modules[name].children())]
    for name in heads + leaves:
        if explains(model, name, channels, example, output):
            return name
    shared = [name for name, call in calls.items() if name and call.times > 1 and call.channels_out == channels]
    if shared:
        cause = f"{shared[0]!r} is called {calls[shared[0]].times} times, and its results are joined"
        cure = "pass `main_output` of an output that has its own classifier, or use another network"
    else:
        cause = "found none"
        cure = "pass `head`, its dotted path (see `model.named_modules()`), or `main_output`, if another output has one"
    raise HeadNotFoundError(
        f"Expected `model` to end in one module that turns features into (B, {channels}, ...) logits, but in "
        f"{type(model).__name__} {cause}: {cure}."
    )


def explains(model: nn.Module, path: str, channels: int, example: Tensor, output: int) -> bool:
    """Whether a logit map depends on the module at `path` alone: with a constant result of it, it has no gradient."""
    constant = hooked(model.get_submodule(path), post=lambda _module, _inputs, result: detached(result))
    with constant, trainable(model), evaluating(model):
        return not logit_maps(model(example), channels)[output].requires_grad


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

"""The plain network in what the user passes: a network, or a LightningModule that contains one."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning._support.lightning_package import is_a, overrides
from apl_lightning._support.modes import evaluating, hooked
from apl_lightning.heads.find_classifier import example_input
from apl_lightning.heads.model import DualHeadModel
from apl_lightning.heads.outputs import channels_of, logit_maps, within_unit_interval

_TRANSFER_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")


def plain_network(model: nn.Module, num_classes: int, name: str | None = None) -> nn.Module:
    """The network in `model`, not copied; `name` is its dotted path if it must not be found automatically.

    A LightningModule (of either package) usually holds its network as an attribute, beside losses, metrics or a
    teacher. The network is the part that receives the image and returns class scores. If the layers of the
    LightningModule itself do that, it is the network.

    Raises:
        TypeError: If it is no network, or one that has two heads already, is compiled or TorchScript.
        ValueError: If there is no part called `name`, or if not exactly one network is found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected `model` to be a network, but got {model!r:.60}: build it, and load a file of weights with "
            "`apl_lightning.checkpoints.load_weights(network, path)`."
        )
    network = model if name is None else _named(model, name)
    if any(isinstance(part, DualHeadModel) for part in network.modules()):
        raise TypeError(
            f"Expected `model` to be a plain network, but {type(network).__name__} has two heads already: pass what "
            "`export()` returns."
        )
    if is_a(model, "LightningModule") and (unused := [hook for hook in _TRANSFER_HOOKS if overrides(model, hook)]):
        warnings.warn(
            f"`{unused[0]}` of {type(model).__name__} does not run here, where only its network is used: move it to "
            "the data set or to the data module.",
            stacklevel=4,
        )
    if name is None and is_a(model, "LightningModule"):
        network = _found(model, num_classes)
    if hasattr(network, "_orig_mod"):
        raise TypeError(
            "Expected `model` to be a plain network, but got a compiled one: pass the network itself and compile what "
            "comes out, as in `torch.compile(APLModule(network, ...))`."
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError(
            "Expected `model` to be a plain network, but got TorchScript, whose forward pass takes no hooks: pass the "
            "network that it was made from."
        )
    return network


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"Expected `network` to name a part of {type(model).__name__}, but got {name!r}: its parts are "
            f"{_names(model)}."
        ) from None


def _names(model: nn.Module) -> str:
    return ", ".join(repr(name) for name, _ in model.named_children()) or "none"


def _found(module: nn.Module, num_classes: int) -> nn.Module:
    parts = {name: part for name, part in module.named_children() if any(True for _ in part.parameters())}
    channels = {name: _channels(part, num_classes) for name, part in parts.items()}
    # A part with one channel may be a discriminator, so a part with `num_classes` channels comes first.
    segmenters = {name: parts[name] for name, count in channels.items() if count == max(channels.values()) > 0}
    try:
        example = example_input(module)
    except ValueError:  # it has no `forward`
        used = segmenters
    else:
        used = {name: part for name, part in segmenters.items() if _receives(part, module, example)}
        if not used and _channels(module, num_classes, only_logits=True):
            return module
    if len(used) == 1:
        return next(iter(used.values()))
    found = " and ".join(repr(name) for name in used) or "none"
    raise ValueError(
        f"Expected {type(module).__name__} to hold one network that returns (B, {num_classes}, ...) logits, but found "
        f"{found} among {_names(module)}: name it as `network`, and see `num_classes`."
    )


def _channels(network: nn.Module, num_classes: int, only_logits: bool = False) -> int:
    """The channels of its logits, or also of probabilities; 0 if it returns none."""
    try:
        example = example_input(network)
    except ValueError:
        return 0
    with evaluating(network), torch.no_grad():
        output = network(example)
    channels = channels_of(output, num_classes)
    maps = [one for one in logit_maps(output, channels) if not (only_logits and within_unit_interval(one))]
    return channels if maps else 0


def _receives(part: nn.Module, module: nn.Module, image: Tensor) -> bool:
    """Whether `part` gets the image itself when `module` runs on it."""
    inputs: list[Any] = []

    def record(_part: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        inputs.extend((*arguments, *options.values()))

    with hooked(part, pre=record, with_kwargs=True), evaluating(module), torch.no_grad():
        module(image)
    return any(isinstance(value, Tensor) and torch.equal(value, image) for value in inputs)

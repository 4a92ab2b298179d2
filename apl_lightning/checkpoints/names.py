"""The names of a network's tensors as files have them."""

from collections.abc import Iterable

from torch import Tensor, nn


def plain_name(name: str) -> str:
    """The name of a tensor without what `torch.compile` adds to those of each compiled module."""
    return name.replace("_orig_mod.", "")


def places_of(name: str, names: Iterable[str]) -> set[str]:
    """The prefixes at which names end with the name of a tensor, as a whole or after a dot."""
    return {each.removesuffix(name) for each in names if f".{each}".endswith(f".{name}")}


def unwrapped(network: nn.Module) -> nn.Module:
    """The network in `torch.compile` or `DataParallel`, which share its weights."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = network.module
        if inner is None:
            return network
        network = inner


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network's state dict, by their plain names."""
    state = network.state_dict()
    return {plain_name(name): value for name, value in state.items() if isinstance(value, Tensor)}

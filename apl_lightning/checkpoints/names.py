"""The names of a network's tensors as files have them."""

from torch import Tensor, nn

COMPILED = "_orig_mod."  # what torch.compile adds to the keys of each compiled module


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
    """The tensors of a state dict, without the parts of their names that `torch.compile` adds."""
    state = network.state_dict()
    return {name.replace(COMPILED, ""): value for name, value in state.items() if isinstance(value, Tensor)}

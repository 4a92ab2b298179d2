"""Keep the parts of a checkpoint that a network does not use."""

from collections.abc import Mapping

import torch
from torch import nn


def keep_unused(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Add buffers with these names to a network, so that its state dict has all keys of the original project.

    A name that no module can have is left out.
    """
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        dtype = torch.int64 if leaf == "num_batches_tracked" else torch.float32
        owner = network
        try:
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(leaf, torch.zeros(shape, dtype=dtype))
        except KeyError:
            continue

"""Compare the tensors in a file with the networks that it might be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apl_lightning.checkpoints.systems import SYSTEMS, Network, Shapes

# What old versions of torch did not save, and what never changes.
_OPTIONAL = ("num_batches_tracked", "upscore2.w", "upscore_pool4.w", "upscore8.w")


class Match(NamedTuple):
    """How a file compares with one network of one system.

    Attributes:
        system: As `load` calls it.
        network: The kind of network.
        prefix: What stands before its keys in the file.
        classes: Channels of the output in the file.
        found: How many of its keys are there.
        missing: Its keys that are not.
        left_over: Keys under the prefix that it has no place for.
        unused: Keys under the prefix that are known to do nothing.
        misshapen: Keys of another shape, with both shapes.
    """

    system: str
    network: Network
    prefix: str
    classes: int
    found: int
    missing: list[str]
    left_over: list[str]
    unused: list[str]
    misshapen: list[str]

    @property
    def faults(self) -> int:
        """How many keys keep the file from being loaded."""
        return len(self.missing) + len(self.left_over) + len(self.misshapen)

    def kinds_of_faults(self) -> list[tuple[str, list[str]]]:
        """What is wrong, each kind with its keys."""
        kinds = [("missing", self.missing), ("left over", self.left_over), ("of another shape", self.misshapen)]
        return [(what, names) for what, names in kinds if names]


def first_of(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def matches(tensors: Mapping[str, Tensor], system: str | None = None) -> list[Match]:
    """All networks whose classifier is in the file, the best first."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    systems = SYSTEMS if system is None else {system: SYSTEMS[system]}
    found = [
        _match(name, network, prefix, {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)})
        for name, networks in systems.items()
        for network in networks
        for prefix in _prefixes(shapes, network.head)
        if (shapes[prefix + network.head][0] >= 2 if network.segmenter else shapes[prefix + network.head][0] in (1, 3))
    ]
    return sorted(found, key=lambda match: (match.faults, -match.found))


def _prefixes(shapes: Shapes, head: str) -> Iterator[str]:
    for name in shapes:
        prefix = name.removesuffix(head)
        if name.endswith(head) and (not prefix or prefix.endswith(".")):
            yield prefix


def _match(system: str, network: Network, prefix: str, shapes: Shapes) -> Match:
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in network.build(shapes).state_dict().items()}
    extra = [name for name in shapes if name not in expected]
    unused = [name for name in extra if name.endswith(network.unused) or name.startswith(network.unused)]
    return Match(
        system,
        network,
        prefix,
        shapes[network.head][0],
        found=sum(name in shapes for name in expected),
        missing=[name for name in expected if name not in shapes and not name.endswith(_OPTIONAL)],
        left_over=[name for name in extra if name not in unused],
        unused=unused,
        misshapen=[
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    )

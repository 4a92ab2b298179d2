"""Compare the tensors in a file with the networks of the seven systems."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apl_lightning.checkpoints.systems import SYSTEMS, Network, Shapes

# Keys that torch < 0.4.1 did not save, and constant bilinear kernels.
_OPTIONAL = ("num_batches_tracked", "upscore2.w", "upscore_pool4.w", "upscore8.w")


class Match(NamedTuple):
    """The comparison of a file with one network of one system.

    `prefix` precedes the network's keys in the file, which has `channels` output channels and `num_found` of the keys.
    The network does not need the keys in `unused`; those in `faults`, by the kind of fault, prevent loading.
    """

    system: str
    network: Network
    prefix: str
    channels: int
    num_found: int
    unused: list[str]
    faults: dict[str, list[str]]

    @property
    def num_faults(self) -> int:
        """Number of keys that prevent loading."""
        return sum(map(len, self.faults.values()))

    def describe_faults(self, limit: int) -> list[str]:
        """Describe each kind of fault with at most `limit` keys."""
        return [f"{kind}: {shorten(names, limit)}" for kind, names in self.faults.items() if names]


def shorten(names: Sequence[str], limit: int) -> str:
    """Join the first names and append the number of omitted names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def matches(tensors: Mapping[str, Tensor], system: str | None = None) -> list[Match]:
    """Compare tensors with all networks (of one system, if given) whose head they contain; the best match is first."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    systems = SYSTEMS if system is None else {system: SYSTEMS[system]}
    found = [
        _match(name, network, prefix, {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)})
        for name, networks in systems.items()
        for network in networks
        for prefix in _prefixes(shapes, network.head)
        if _plausible(network, shapes[prefix + network.head][0])
    ]
    return sorted(found, key=lambda match: (match.num_faults, -match.num_found))


def _prefixes(shapes: Shapes, head: str) -> Iterator[str]:
    for name in shapes:
        prefix = name.removesuffix(head)
        if name.endswith(head) and (not prefix or prefix.endswith(".")):
            yield prefix


def _plausible(network: Network, channels: int) -> bool:
    return channels >= 2 if network.segmenter else channels in (1, 3)


def _match(system: str, network: Network, prefix: str, shapes: Shapes) -> Match:
    channels = shapes[network.head][0]
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in network.build(channels, shapes).state_dict().items()}
    extra = [name for name in shapes if name not in expected]
    unused = [name for name in extra if name.endswith(network.unused) or name.startswith(network.unused)]
    found = {name: shape for name, shape in expected.items() if name in shapes}
    faults = {
        "missing": [name for name in expected if name not in shapes and not name.endswith(_OPTIONAL)],
        "unexpected": [name for name in extra if name not in unused],
        "of a different shape": [
            f"{name} {shapes[name]} instead of {shape}" for name, shape in found.items() if shapes[name] != shape
        ],
    }
    return Match(system, network, prefix, channels, len(found), unused, faults)

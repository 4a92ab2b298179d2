"""Compare the tensors in a file with the networks of the seven systems."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apl_lightning.checkpoints.systems import SYSTEMS, Network, Shapes, is_kernel

# Keys that torch < 0.4.1 did not save, and constant bilinear kernels.
_OPTIONAL = ("num_batches_tracked", "upscore2.w", "upscore_pool4.w", "upscore8.w")
# Of the networks in one file, only the largest are compared.
_MAX_NETWORKS = 8
# The parts of an `APLModule`. Its export is the teacher, if it has one.
_STUDENT, _TEACHER = "model.network.", "teacher.module.network."


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

    def call(self, path: object, found: Sequence["Match"]) -> str:
        """The call of `load` for this network, with its prefix if several networks like it are among `found`."""
        arguments = [repr(self.system), repr(str(path))]
        if self.network.segmenter:
            arguments.append(f"num_classes={self.channels}")
        elif self.system != "cyclegan":
            arguments.append("part='generator'")
        alike = [m for m in found if (m.system, m.network.segmenter) == (self.system, self.network.segmenter)]
        if len({match.prefix for match in alike}) > 1:
            arguments.append(f"prefix={self.prefix!r}")
        return f"load({', '.join(arguments)})"


def shorten(names: Sequence[str], limit: int) -> str:
    """Join the first names and append the number of omitted names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def matches(tensors: Mapping[str, Tensor], system: str | None = None, prefix: str | None = None) -> list[Match]:
    """Compare tensors with all networks (of one system, if given) whose head they contain; the best match is first.

    Compares the networks with the most keys in the file, and the one at `prefix`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sizes = Counter(name[: i + 1] for name in shapes for i, letter in enumerate(name) if letter == ".")
    systems = SYSTEMS if system is None else {system: SYSTEMS[system]}
    found = []
    for name, networks in systems.items():
        for network in networks:
            prefixes = sorted(_prefixes(shapes, network), key=lambda p: (p not in (prefix, ""), -sizes[p]))
            for place in prefixes[:_MAX_NETWORKS]:
                part = {k.removeprefix(place): tensor for k, tensor in tensors.items() if k.startswith(place)}
                found.append(_match(name, network, place, part))
    return sorted(found, key=lambda match: (match.num_faults, -match.num_found))


def loadable(found: Sequence[Match]) -> list[Match]:
    """The matches without faults; of an `APLModule` with a teacher, only the teacher."""
    perfect = [match for match in found if not match.num_faults]
    kept = without_students({match.prefix for match in perfect})
    return [match for match in perfect if match.prefix in kept]


def without_students(prefixes: Collection[str]) -> set[str]:
    """The prefixes of networks in a file; of an `APLModule` with a teacher, only that of the teacher."""
    return {p for p in prefixes if _STUDENT not in p or p.replace(_STUDENT, _TEACHER) not in prefixes}


def _prefixes(shapes: Shapes, network: Network) -> list[str]:
    """The prefixes of all heads of a network in a file."""
    prefixes = [name.removesuffix(network.head) for name in shapes if name.endswith(network.head)]
    return [p for p in prefixes if (not p or p.endswith(".")) and _plausible(network, shapes[p + network.head])]


def _plausible(network: Network, shape: tuple[int, ...]) -> bool:
    return is_kernel(shape) and (shape[0] >= 2 if network.segmenter else shape[0] in (1, 3))


def _match(system: str, network: Network, prefix: str, tensors: Mapping[str, Tensor]) -> Match:
    channels = tensors[network.head].shape[0]
    with torch.device("meta"):
        expected = network.build(channels, {name: tuple(t.shape) for name, t in tensors.items()}).state_dict()
    extra = [name for name in tensors if name not in expected]
    unused = [name for name in extra if name.endswith(network.unused) or name.startswith(network.unused)]
    found = {name: (tensors[name], parameter) for name, parameter in expected.items() if name in tensors}
    faults = {
        "missing": [name for name in expected if name not in tensors and not name.endswith(_OPTIONAL)],
        "unexpected": [name for name in extra if name not in unused],
        "of a different shape": [
            f"{name} {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
            for name, (ours, theirs) in found.items()
            if ours.shape != theirs.shape
        ],
        "not floating-point": [
            f"{name} {ours.dtype}"
            for name, (ours, theirs) in found.items()
            if theirs.is_floating_point() and not ours.is_floating_point()
        ],
    }
    return Match(system, network, prefix, channels, len(found), unused, faults)

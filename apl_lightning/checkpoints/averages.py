"""Recognise an average of the weights that a file keeps beside the network."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.names import places_of, tensors_of
from apl_lightning.checkpoints.systems import Shapes


def refuse_average(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: str | Path) -> None:
    """Raise a `CheckpointError` if a file has the parameters at `prefix` a second time, without the other tensors.

    An average is often kept without the statistics of BatchNorm, and as a list or under names of its own.
    """
    known = tensors_of(network)
    parameters = {name: tuple(known[name].shape) for name, _ in network.named_parameters() if name in known}
    if not parameters:
        return
    place = _incomplete_copy(parameters, known, tensors, prefix)
    if place is None:
        place = _renamed_copy(parameters, tensors, prefix)
    if place is not None:
        raise CheckpointError(
            f"Expected one {type(network).__name__} in {path}, but got its parameters below {place!r} too, "
            f"without its other tensors, as of an average of the weights: pass prefix={prefix!r}, or join both in one "
            "state dict."
        )


def _incomplete_copy(
    parameters: Shapes, known: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str
) -> str | None:
    """Another place than the prefix of all parameters under their names, but not of all other tensors."""
    first = next(iter(parameters))
    for place in sorted(places_of(first, tensors) - {prefix}):
        shapes = {name: tuple(tensors[place + name].shape) for name in parameters if place + name in tensors}
        if shapes == parameters and not all(place + name in tensors for name in known):
            return place
    return None


def _renamed_copy(parameters: Shapes, tensors: Mapping[str, Tensor], prefix: str) -> str | None:
    """The dictionary or list with as many tensors of these shapes under other names."""
    wanted = Counter(parameters.values())
    own = {prefix + name for name in parameters}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        groups[name[: name.rfind(".") + 1]].append(name)
    for place, names in groups.items():
        shapes = Counter(tuple(tensors[name].shape) for name in names)
        if len(parameters) > 1 and own.isdisjoint(names) and wanted <= shapes:
            return place
    return None

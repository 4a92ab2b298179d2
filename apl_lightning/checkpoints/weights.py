"""Load the weights in a file into a network of your own."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from apl_lightning.checkpoints.averages import refuse_average
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files import read_tensors
from apl_lightning.checkpoints.filling import fill
from apl_lightning.checkpoints.match import shorten, without_students
from apl_lightning.checkpoints.names import places_of, tensors_of, unwrapped
from apl_lightning.checkpoints.systems import Shapes

# Counters, which old files lack and nothing reads.
_OPTIONAL = "num_batches_tracked"


def load_weights(network: nn.Module, path: str | Path, prefix: str | None = None) -> nn.Module:
    """Load the weights in a file into `network`, and return it in evaluation mode, without `torch.compile`.

    Wrappers around the state dict, such as that of a Lightning checkpoint, and prefixes of its keys are removed. Of a
    checkpoint of `APLModule`, the network is the refined one, as `export` returns it. Code in the file is never
    executed.

    Args:
        network: A network of the class that was saved.
        path: A file of `torch.save` or a `.safetensors` file.
        prefix: What precedes the keys, if the file has several networks of this class.

    Raises:
        CheckpointError: If the file is damaged, contains Python objects or NaN, or does not contain the network once.
        FileNotFoundError: If the file does not exist.

    Examples:
        >>> import torch
        >>> from apl_lightning.checkpoints import load_weights
        >>> saved = torch.nn.Conv2d(1, 5, 1)
        >>> wrapped = {"state_dict": {f"model.{name}": value for name, value in saved.state_dict().items()}}
        >>> path = getfixture("tmp_path") / "source.ckpt"
        >>> torch.save(wrapped, path)
        >>> network = load_weights(torch.nn.Conv2d(1, 5, 1), path)
        >>> torch.equal(network.weight, saved.weight)
        True
    """
    tensors = read_tensors(path)
    network = unwrapped(network)
    expected = tensors_of(network)
    shapes = {name: tuple(value.shape) for name, value in expected.items() if not name.endswith(_OPTIONAL)}
    if not shapes:
        raise ValueError(
            f"Expected a network with weights, but {type(network).__name__} has none: build its layers before."
        )
    faults = {place: _faults(tensors, place, shapes) for place in _places(tensors, shapes)}
    complete = [place for place, found in faults.items() if not found]
    found = sorted(without_students(complete)) if prefix is None else [place for place in complete if place == prefix]
    if len(found) != 1:
        name = type(network).__name__
        if complete:
            got = "several" if prefix is None else f"prefix={prefix!r}"
            raise CheckpointError(f"Expected one {name} in {path}, but got {got}: pass one of {complete} as `prefix`.")
        raise CheckpointError(_problem(name, path, list(tensors), shapes, faults))
    if prefix is None:
        refuse_average(network, tensors, found[0], path)
    known = {found[0] + name for name in expected}
    if left := [name for name in tensors if name.startswith(found[0]) and name not in known]:
        raise CheckpointError(
            f"Expected {path} to contain {type(network).__name__} and nothing more below {found[0]!r}, but it has "
            f"{len(left)} more tensors, such as {shorten(left, 2)}: build the network as it was trained."
        )
    return fill(network, tensors, found[0], path)


def _places(tensors: Mapping[str, Tensor], shapes: Shapes) -> list[str]:
    """The prefixes at which a file has the first or the last tensor of the network."""
    names = list(shapes)
    return sorted(places_of(names[0], tensors) | places_of(names[-1], tensors))


def _faults(tensors: Mapping[str, Tensor], place: str, shapes: Shapes) -> dict[str, list[str]]:
    """The tensors of the network that the file lacks at a place, and those of another shape."""
    missing = [name for name in shapes if place + name not in tensors]
    found = {name: tuple(tensors[place + name].shape) for name in shapes if place + name in tensors}
    other = [f"{name} {shape} instead of {shapes[name]}" for name, shape in found.items() if shape != shapes[name]]
    return {kind: names for kind, names in (("missing", missing), ("of a different shape", other)) if names}


def _problem(
    name: str, path: str | Path, names: list[str], shapes: Shapes, faults: dict[str, dict[str, list[str]]]
) -> str:
    """The message for a file without the network: what differs at the place with most of its tensors."""
    expected = f"Expected {path} to contain the {len(shapes)} tensors of {name}"
    cure = "build the network as it was trained."
    if not faults:
        return f"{expected}, such as {shorten(list(shapes), 2)}, but its {len(names)} are {shorten(names, 4)}: {cure}"
    place, found = min(faults.items(), key=lambda item: len(item[1].get("missing", ())))
    below = f" below {place!r}" if place else ""
    kinds = "; ".join(f"{kind}: {shorten(these, 3)}" for kind, these in found.items())
    return f"{expected}, but{below} are {kinds}: {cure}"

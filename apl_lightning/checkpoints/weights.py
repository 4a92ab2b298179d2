"""Load the weights in a file into a network of your own."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files import read_tensors
from apl_lightning.checkpoints.filling import fill
from apl_lightning.checkpoints.match import shorten, without_students

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
    network = getattr(network, "_orig_mod", network)  # of a compiled one, which shares its weights
    expected = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    shapes = {name: tuple(value.shape) for name, value in expected.items() if not name.endswith(_OPTIONAL)}
    if not shapes:
        raise ValueError(
            f"Expected a network with weights, but {type(network).__name__} has none: build its layers before."
        )
    first = next(iter(shapes))
    places = sorted(name.removesuffix(first) for name in tensors if f".{name}".endswith(f".{first}"))

    def fits(place: str, names: Iterable[str]) -> bool:
        return all(place + name in tensors and tuple(tensors[place + name].shape) == shapes[name] for name in names)

    complete = [place for place in places if fits(place, shapes)]
    found = sorted(without_students(complete)) if prefix is None else [place for place in complete if place == prefix]
    if len(found) != 1:
        raise CheckpointError(_problem(network, path, list(tensors), shapes, complete, prefix))
    # An average of the weights is often kept without the statistics of BatchNorm.
    parameters = {name for name, _ in network.named_parameters()}
    partial = [place for place in places if place not in complete and fits(place, parameters & shapes.keys())]
    if prefix is None and partial and parameters:
        raise CheckpointError(
            f"Expected one {type(network).__name__} in {path}, but got its parameters below {partial[0]!r} too, "
            f"without the other tensors: pass prefix={found[0]!r}, or join both in one state dict."
        )
    known = {found[0] + name for name in expected}
    if left := [name for name in tensors if name.startswith(found[0]) and name not in known]:
        raise CheckpointError(
            f"Expected {path} to contain {type(network).__name__} and nothing more below {found[0]!r}, but it has "
            f"{len(left)} more tensors, such as {shorten(left, 2)}: build the network as it was trained."
        )
    return fill(network, tensors, found[0], path)


def _problem(
    network: nn.Module,
    path: str | Path,
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    complete: list[str],
    prefix: str | None,
) -> str:
    name = type(network).__name__
    if complete:
        got = "several" if prefix is None else f"prefix={prefix!r}"
        return f"Expected one {name} in {path}, but got {got}: pass one of {complete} as `prefix`."
    after = "" if prefix is None else f" after {prefix!r}"
    return (
        f"Expected {path} to contain the {len(shapes)} tensors of {name}{after}, such as {shorten(list(shapes), 2)}, "
        f"but its {len(names)} are {shorten(names, 4)}, or have other shapes: build the network as it was trained."
    )

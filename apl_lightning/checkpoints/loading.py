"""Load the network in a checkpoint of one of the seven systems."""

from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from apl_lightning.checkpoints.averages import refuse_average
from apl_lightning.checkpoints.choosing import choose
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files import read_tensors
from apl_lightning.checkpoints.filling import fill
from apl_lightning.checkpoints.systems import SYSTEMS

Part = Literal["segmenter", "generator"]


def load(
    system: str,
    path: str | Path,
    num_classes: int = 5,
    *,
    prefix: str | None = None,
    part: Part | None = None,
    bounds: tuple[float, float] | None = None,
    tanh: bool | None = None,
) -> nn.Module:
    """Load a network that was saved by one of the seven systems.

    The architecture (such as ResNet or VGG, one or two classifiers, number of blocks, width) is detected from the keys
    and shapes in the file. Wrappers around the state dict and prefixes of its keys are removed. Code in the file is
    never executed.

    Args:
        system: `"advent"`, `"adaptsegnet"`, `"cycada"`, `"synseg"`, `"cyclegan"` (generator), `"sifa-v1"`,
            `"sifa-v2"` (TensorFlow bundles) or `"sifa-pytorch"`.
        path: A file of `torch.save`, a `.safetensors` file, or a checkpoint of `APLModule`, of which it returns the
            refined network as `export` does. For a TensorFlow bundle: the prefix (`sifa-299`), one of the files, or
            the folder.
        num_classes: Number of classes including the background. Ignored for generators.
        prefix: What precedes the keys of the network, if the file has several.
        part: `"generator"` loads SIFA's generator from source to target.
        bounds: The z-scores (low, high) that the `preprocess` of SIFA maps to -1 and 1; by default those of SIFA's CT
            images, (-2.8, 3.2). Those of its MR images are (-1.8, 4.4).
        tanh: `False` for `"synseg"` files of the fork without the final Tanh, which have the same keys.

    Returns:
        The network in evaluation mode, with the keys of the original state dict (for TensorFlow bundles: of SIFA's
        PyTorch port). Its method `preprocess` converts raw images to network inputs.

    Raises:
        CheckpointError: If the file is damaged, has another format, contains Python objects or NaN, or does not
            contain the network with this number of classes.
        FileNotFoundError: If the file does not exist.
        TypeError: If the system does not support an option.
        ValueError: If `system` or `part` is unknown, or `bounds` do not increase.
    """
    if system not in SYSTEMS:
        raise ValueError(f"Expected `system` to be one of {sorted(SYSTEMS)}, but got {system!r}.")
    given: dict[str, Any] = {"part": part, "bounds": bounds, "tanh": tanh}
    options = {name: value for name, value in given.items() if value is not None}
    known = {option for network in SYSTEMS[system] for option in network.options}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"Expected options of {system!r} among {sorted(known | {'prefix'})}, but got {unknown}.")
    if part not in (None, *get_args(Part)):
        raise ValueError(f"Expected `part` to be 'segmenter' or 'generator', but got {part!r}.")
    options.pop("part", None)
    segmenter = system != "cyclegan" and part != "generator"
    tensors = read_tensors(path)
    match = choose(path, system, tensors, segmenter, prefix)
    if segmenter and match.channels != num_classes:
        raise CheckpointError(
            f"Expected {num_classes} classes, but {path} has {match.channels} ({match.prefix}{match.network.head}): "
            f"pass num_classes={match.channels}."
        )
    shapes = {n.removeprefix(match.prefix): tuple(t.shape) for n, t in tensors.items() if n.startswith(match.prefix)}
    network = match.network.build(match.channels, shapes, **options)
    if prefix is None:
        refuse_average(network, tensors, match.prefix, path)
    return fill(network, tensors, match.prefix, path)

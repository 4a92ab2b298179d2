"""Load the network in a checkpoint of one of the seven systems."""

from pathlib import Path
from typing import Any

from torch import nn

from apl_lightning.checkpoints.choosing import choose
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files import read_tensors
from apl_lightning.checkpoints.filling import fill
from apl_lightning.checkpoints.systems import SYSTEMS


def load(system: str, path: str | Path, num_classes: int = 5, **options: Any) -> nn.Module:
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
        **options: `prefix="..."` selects one of several networks in the file. `tanh=False` is for `"synseg"` files of
            the fork without the final Tanh, which have the same keys. `bounds=(low, high)` for SIFA are the z-scores
            that `preprocess` maps to -1 and 1. `part="generator"` loads SIFA's generator from source to target.

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
    known = {"prefix", *(option for network in SYSTEMS[system] for option in network.options)}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"Expected options of {system!r} among {sorted(known)}, but got {unknown}.")
    part = options.pop("part", None)
    if part not in (None, "segmenter", "generator"):
        raise ValueError(f"Expected `part` to be 'segmenter' or 'generator', but got {part!r}.")
    segmenter = system != "cyclegan" and part != "generator"
    prefix = options.pop("prefix", None)
    tensors = read_tensors(path)
    match = choose(path, system, tensors, segmenter, prefix)
    if segmenter and match.channels != num_classes:
        raise CheckpointError(
            f"Expected {num_classes} classes, but {path} has {match.channels} ({match.prefix}{match.network.head}): "
            f"pass num_classes={match.channels}."
        )
    shapes = {n.removeprefix(match.prefix): tuple(t.shape) for n, t in tensors.items() if n.startswith(match.prefix)}
    return fill(match.network.build(match.channels, shapes, **options), tensors, match.prefix, path)

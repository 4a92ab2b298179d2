"""Load the network in a checkpoint of one of the seven systems."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apl_lightning._support.modes import not_finite
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files import is_bundle, read_sifa_bundle, read_torch_file
from apl_lightning.checkpoints.match import Match, matches, shorten
from apl_lightning.checkpoints.systems import SYSTEMS


def load(system: str, path: str | Path, num_classes: int = 5, **options: Any) -> nn.Module:
    """Load a network that was saved by one of the seven systems.

    The architecture (such as ResNet or VGG, one or two classifiers, number of blocks, width) is detected from the keys
    and shapes in the file. Wrappers around the state dict and prefixes of its keys are removed. Code in the file is
    never executed.

    Args:
        system: `"advent"`, `"adaptsegnet"`, `"cycada"`, `"synseg"`, `"cyclegan"` (generator), `"sifa-v1"`,
            `"sifa-v2"` (TensorFlow bundles) or `"sifa-pytorch"`.
        path: The file. For a TensorFlow bundle: the prefix (`sifa-299`), one of the files, or the folder.
        num_classes: Number of classes including the background. Ignored for generators.
        **options: `prefix="..."` selects one of several networks in the file. `tanh=False` is for `"synseg"` files of
            the fork without the final Tanh, which have the same keys. `bounds=(low, high)` for SIFA are the z-scores
            that `preprocess` maps to -1 and 1. `part="generator"` loads SIFA's generator from source to target.

    Returns:
        The network in evaluation mode, with the keys of the original state dict (for TensorFlow bundles: of SIFA's
        PyTorch port). Its method `preprocess` converts raw images to network inputs.

    Raises:
        CheckpointError: If the file is damaged, contains Python objects or NaN, or does not contain the network.
        FileNotFoundError: If the file does not exist.
        TypeError: If the system does not support an option.
        ValueError: If `system` or `part` is unknown, or the number of classes is different.
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
    match = _best_match(path, system, tensors, segmenter, prefix)
    if segmenter and match.channels != num_classes:
        raise CheckpointError(
            f"Expected {num_classes} classes, but {path} has {match.channels} ({match.prefix}{match.network.head}): "
            f"pass num_classes={match.channels}."
        )
    state = {name.removeprefix(match.prefix): t for name, t in tensors.items() if name.startswith(match.prefix)}
    network = match.network.build(match.channels, {name: tuple(t.shape) for name, t in state.items()}, **options)
    initial = network.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in initial}
    if damaged := not_finite(state):
        raise CheckpointError(
            f"Expected finite weights, but {path} contains NaN or infinity in {shorten(damaged, 3)}: use an earlier "
            "checkpoint."
        )
    network.load_state_dict({**initial, **state})
    return network.eval()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors in a TensorFlow bundle or a torch file, by name."""
    return read_sifa_bundle(path) if is_bundle(path) else read_torch_file(path)


def _best_match(
    path: str | Path, system: str, tensors: dict[str, Tensor], segmenter: bool, prefix: str | None
) -> Match:
    candidates = [match for match in matches(tensors, system) if match.network.segmenter == segmenter]
    if prefix is not None:
        candidates = [match for match in candidates if match.prefix == prefix]
    perfect = [match for match in candidates if not match.num_faults]
    if len({match.prefix for match in perfect}) > 1:
        choices = " or ".join(f"prefix={match.prefix!r}" for match in perfect)
        raise CheckpointError(f"Expected one network, but {path} contains several: pass {choices}.")
    if perfect:
        return perfect[0]
    for other in matches(tensors):
        if not other.num_faults and other.network.segmenter == segmenter:
            raise CheckpointError(
                f"Expected a network of {system!r}, but {path} contains a {other.network.title} with {other.channels} "
                f"output channel(s): load it with load({other.system!r}, ...)."
            )
    if candidates:
        best = candidates[0]
        raise CheckpointError(
            f"Expected the keys of {system!r} ({best.network.title}), but got {path} with keys that are "
            f"{'; '.join(best.describe_faults(3))}."
        )
    heads = sorted({network.head for network in SYSTEMS[system]})
    raise CheckpointError(
        f"Expected a network of {system!r} with the key {' or '.join(heads)}, but {path} contains "
        f"{shorten(list(tensors), 3)}: run `python -m apl_lightning.checkpoints FILE` to identify the file."
    )

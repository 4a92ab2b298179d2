"""From a file of one of the seven systems to a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apl_lightning.checkpoints.bundle import is_bundle
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.match import Match, first_of, matches
from apl_lightning.checkpoints.sifa_bundle import read_sifa_bundle
from apl_lightning.checkpoints.systems import SYSTEMS
from apl_lightning.checkpoints.torch_file import read_torch_file


def load(system: str, path: str | Path, num_classes: int = 5, **options: Any) -> nn.Module:
    """The network that one of the seven systems of the paper's table saved, ready to be refined.

    Which of a system's networks it is (ResNet or VGG, one level or two, DRN-26, DRN-42 or FCN-8s, the width) is read
    from the file. Prefixes and wrappers around the state dict are stripped. Nothing in the file is executed.

    Args:
        system: `"advent"`, `"adaptsegnet"`, `"cycada"`, `"synseg"`, `"cyclegan"` (a generator), `"sifa-v1"`,
            `"sifa-v2"` (TensorFlow bundles) or `"sifa-pytorch"`.
        path: The file; of a TensorFlow bundle its prefix (`sifa-299`), any of its files, or its folder.
        num_classes: Classes that the network must have, background included; not used for a generator.
        **options: `prefix`, where several networks of one kind are in the file. `tanh=False` for `"synseg"` files of
            the fork without the last Tanh, whose keys are the same. `bounds=(low, high)`, the z-scores that
            `preprocess` maps to -1 and 1, for SIFA. `part="generator"` for SIFA's source-to-target generator.

    Returns:
        The network in evaluation mode, with the keys of the system's own state dict (SIFA's TensorFlow variables: those
        of the PyTorch port). `network.preprocess(image)` turns a raw image into its input.

    Raises:
        CheckpointError: If the file is damaged, holds Python objects, or is of another network.
        FileNotFoundError: If it is not there.
        TypeError: If an option is unknown to the system.
        ValueError: If the system is unknown or the number of classes is another.
    """
    if system not in SYSTEMS:
        raise ValueError(f"Expected `system` to be one of {sorted(SYSTEMS)}, but got {system!r}.")
    known = {"prefix", *(option for network in SYSTEMS[system] for option in network.options)}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"Expected options of {system!r} among {sorted(known)}, but got {unknown}.")
    prefix = options.pop("prefix", None)
    segmenter = _wants_segmenter(system, options.pop("part", None))
    tensors = read_tensors(path)
    match = _choose(path, system, tensors, segmenter, prefix)
    if segmenter and match.classes != num_classes:
        raise CheckpointError(
            f"Expected {num_classes} classes, but {path} has {match.classes} ({match.prefix}{match.network.head}): "
            f"pass num_classes={match.classes}."
        )
    state = {name.removeprefix(match.prefix): t for name, t in tensors.items() if name.startswith(match.prefix)}
    network = match.network.build({name: tuple(t.shape) for name, t in state.items()}, **options)
    state = {name: tensor for name, tensor in state.items() if name in network.state_dict()}
    if damaged := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"Expected finite weights, but {path} holds NaN or infinity in {first_of(damaged, 3)}.")
    network.load_state_dict({**network.state_dict(), **state})
    return network.eval()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors in a checkpoint of any of the seven systems, by name."""
    return read_sifa_bundle(path) if is_bundle(path) else read_torch_file(path)


def _wants_segmenter(system: str, part: str | None) -> bool:
    if part not in (None, "segmenter", "generator"):
        raise ValueError(f"Expected `part` to be 'segmenter' or 'generator', but got {part!r}.")
    return system != "cyclegan" and part != "generator"


def _choose(path: str | Path, system: str, tensors: dict[str, Tensor], segmenter: bool, prefix: str | None) -> Match:
    candidates = [match for match in matches(tensors, system) if match.network.segmenter == segmenter]
    if prefix is not None:
        candidates = [match for match in candidates if match.prefix == prefix]
    perfect = [match for match in candidates if not match.faults]
    if len({match.prefix for match in perfect}) > 1:
        found = " and ".join(repr(match.prefix) for match in perfect)
        raise CheckpointError(f"Expected one network, but {path} holds several: pass prefix=, one of {found}.")
    if perfect:
        return perfect[0]
    raise CheckpointError(_explanation(path, system, tensors, candidates, segmenter))


def _explanation(
    path: str | Path, system: str, tensors: dict[str, Tensor], candidates: list[Match], segmenter: bool
) -> str:
    others = [match for match in matches(tensors) if not match.faults and match.network.segmenter == segmenter]
    if others:
        other = others[0]
        return (
            f"Expected a network of {system!r}, but {path} holds a {other.network.title} with {other.classes} output "
            f"channel(s): load it with load({other.system!r}, ...)."
        )
    if not candidates:
        heads = sorted({network.head for network in SYSTEMS[system]})
        return (
            f"Expected a network of {system!r}, whose keys end in {' or '.join(heads)}, but {path} has "
            f"{first_of(list(tensors), 3)}: `python -m apl_lightning.checkpoints FILE` says what a file is."
        )
    best = candidates[0]
    faults = "; ".join(f"{first_of(names, 3)} {what}" for what, names in best.kinds_of_faults())
    return f"Expected the keys of {system!r} ({best.network.title}), but in {path} are {faults}."

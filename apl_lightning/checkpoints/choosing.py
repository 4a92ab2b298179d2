"""Choose the network in a file that `load` returns, or explain why there is none."""

from pathlib import Path

from torch import Tensor

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.match import Match, loadable, matches, shorten
from apl_lightning.checkpoints.systems import SYSTEMS, unsupported


def choose(path: str | Path, system: str, tensors: dict[str, Tensor], segmenter: bool, prefix: str | None) -> Match:
    """The segmenter or the generator of a system in a file, at a prefix of its keys if there are several.

    Raises a `CheckpointError` that explains what the file contains instead.
    """
    found = [match for match in matches(tensors, system, prefix) if match.network.segmenter == segmenter]
    perfect = loadable(found)
    if prefix is not None:
        found = [match for match in found if match.prefix == prefix]
        if perfect and not found:
            raise CheckpointError(f"Expected a network at prefix={prefix!r} in {path}: pass {_prefixes(perfect)}.")
        if found and found[0].num_faults:
            raise CheckpointError(_describe_faults(path, found[0]))
        perfect = found[:1]
    if len({match.prefix for match in perfect}) > 1:
        raise CheckpointError(f"Expected one network, but {path} contains several: pass {_prefixes(perfect)}.")
    if perfect:
        return perfect[0]
    others = loadable(matches(tensors))
    for other in sorted(others, key=lambda match: match.network.segmenter != segmenter):
        if other.network.segmenter == segmenter or not found:
            raise CheckpointError(
                f"Expected a {'segmenter' if segmenter else 'generator'} of {system!r}, but {path} contains a "
                f"{other.network.title} with {other.channels} output channel(s): load it with "
                f"{other.call(path, others)}."
            )
    if found:
        raise CheckpointError(_describe_faults(path, found[0]))
    raise CheckpointError(f"Expected a network of {system!r}{_contents(path, system, tensors, segmenter)}")


def _prefixes(perfect: list[Match]) -> str:
    return " or ".join(dict.fromkeys(f"prefix={match.prefix!r}" for match in perfect))


def _describe_faults(path: str | Path, match: Match) -> str:
    return (
        f"Expected the keys of {match.system!r} ({match.network.title}), but got {path} with keys that are "
        f"{'; '.join(match.describe_faults(3))}."
    )


def _contents(path: str | Path, system: str, tensors: dict[str, Tensor], segmenter: bool) -> str:
    """Describe a file that contains no network like those of a system."""
    if kind := unsupported(tensors):
        return f", but {path} contains {kind}."
    heads = sorted({network.head for network in SYSTEMS[system] if network.segmenter == segmenter})
    wrong = [f"{name} of shape {tuple(t.shape)}" for name, t in tensors.items() if name.endswith(tuple(heads))]
    return (
        f" with the kernel {' or '.join(heads)}, but {path} contains {shorten(wrong or list(tensors), 3)}: run "
        "`python -m apl_lightning.checkpoints FILE` to identify the file."
    )

"""Describe the contents of a checkpoint."""

from pathlib import Path

from apl_lightning.checkpoints.files import read_tensors
from apl_lightning.checkpoints.match import Match, loadable, matches, shorten
from apl_lightning.checkpoints.systems import unsupported

_NOTES = {
    "advent": "ADVENT and AdaptSegNet have the same keys, but use 4 and 2 dilations: select the system yourself.",
    "synseg": "The fork without the final Tanh has the same keys: pass tanh=False for its files.",
    "cyclegan": "SynSeg-Net's generators have the same keys. If A is the source, G_B translates target to source.",
}


def identify(path: str | Path) -> str:
    """Describe a checkpoint: the system, the network, its classes, and any missing or unexpected keys.

    Takes a path as [`load`][apl_lightning.checkpoints.load] does, and returns lines of text. If no network matches,
    they describe the differences from the closest one.

    Raises:
        CheckpointError: If the file is damaged, has another format or contains Python objects.
        FileNotFoundError: If the file does not exist.
    """
    tensors = read_tensors(path)
    found = matches(tensors)
    perfect = loadable(found)
    systems = {match.system for match in perfect if match.network.segmenter}
    # Both versions of SIFA have the same generator. Only the segmenter beside it identifies the version.
    perfect = [match for match in perfect if match.system in systems or match.system == "cyclegan" or not systems]
    if perfect:
        return "\n".join(line for match in perfect for line in _describe(Path(path), match, perfect))
    if "state_dict.model.warm" in tensors:
        return f"{path}: a checkpoint of a refinement module; `load_weights`, or `apl-lightning export`, reads it"
    lines = [f"{path}: {len(tensors)} tensors, but no network of the seven systems"]
    if kind := unsupported(tensors):
        return "\n".join([*lines, f"  contains {kind}"])
    if not found:
        return "\n".join([*lines, f"  keys: {shorten(list(tensors), 8)}"])
    best = found[0]
    title = f"{best.system}, {best.network.title} ({best.channels} output channels)"
    lines.append(f"  closest network: {title}, {best.num_found} of its keys found")
    return "\n".join([*lines, *(f"  {fault}" for fault in best.describe_faults(8))])


def _describe(path: Path, match: Match, perfect: list[Match]) -> list[str]:
    unit = "classes" if match.network.segmenter else "output channel(s)"
    lines = [
        f"{path}: {match.system}, {match.network.title}, {match.channels} {unit}",
        f"  {match.call(path, perfect)}",
        f"  keys: {match.num_found} found, none missing or unexpected",
    ]
    if match.prefix:
        lines.append(f"  prefix: {match.prefix!r}, removed by load")
    if match.unused:
        lines.append(f"  unused: {shorten(match.unused, 1)}")
    if match.system in _NOTES:
        lines.append(f"  note: {_NOTES[match.system]}")
    return lines

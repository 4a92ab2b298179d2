"""Say in words what a checkpoint is."""

from __future__ import annotations

from pathlib import Path

from apl_lightning.checkpoints.loading import read_tensors
from apl_lightning.checkpoints.match import Match, first_of, matches

_TWINS = {
    "advent": "ADVENT and AdaptSegNet have the same keys: only you know which it is (4 dilations count, or 2).",
    "synseg": "The fork without the last Tanh has the same keys: pass tanh=False for its files.",
    "cyclegan": "SynSeg-Net's generators have the same keys; where A is the source, G_B goes from target to source.",
}


def identify(path: str | Path) -> str:
    """What a file is: the system, the network, its classes, and which keys are missing or left over.

    Args:
        path: As in [`load`][apl_lightning.checkpoints.load].

    Returns:
        Lines of text. If the file is none of the seven, they tell how far it is from the closest.

    Raises:
        CheckpointError: If the file is damaged or holds Python objects.
        FileNotFoundError: If it is not there.
    """
    tensors = read_tensors(path)
    found = matches(tensors)
    perfect = [match for match in found if not match.faults]
    systems = {match.system for match in perfect if match.network.segmenter}
    # SIFA's generator is the same in both versions: its segmenter, beside it, tells which.
    perfect = [match for match in perfect if match.system in systems or match.system == "cyclegan" or not systems]
    if perfect:
        return "\n".join(line for match in perfect for line in _description(Path(path), match))
    lines = [f"{path}: {len(tensors)} tensors, no network of the seven systems"]
    if not found:
        names = list(tensors)
        return "\n".join([*lines, f"  its keys: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"])
    best = found[0]
    lines.append(
        f"  closest: {best.system}, {best.network.title} ({best.classes} output channels), {best.found} keys there"
    )
    lines += [f"  {what}: {first_of(names, 8)}" for what, names in best.kinds_of_faults()]
    return "\n".join(lines)


def _description(path: Path, match: Match) -> list[str]:
    what = "classes" if match.network.segmenter else "output channel(s)"
    arguments = f"num_classes={match.classes}" if match.network.segmenter else ""
    if not match.network.segmenter and match.system != "cyclegan":
        arguments = "part='generator'"
    call = ", ".join(filter(None, (repr(match.system), repr(str(path)), arguments)))
    lines = [f"{path}: {match.system}, {match.network.title}, {match.classes} {what}", f"  load({call})"]
    lines.append(f"  keys: {match.found} found, none missing, none left over")
    if match.prefix:
        lines.append(f"  prefix: {match.prefix!r}, will be stripped")
    if match.unused:
        lines.append(f"  not used: {len(match.unused)}, such as {match.unused[0]}")
    if match.system in _TWINS:
        lines.append(f"  note: {_TWINS[match.system]}")
    return lines

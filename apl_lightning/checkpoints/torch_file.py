"""Read the tensors of a torch checkpoint, and nothing but tensors."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from apl_lightning.checkpoints.error import CheckpointError


def read_torch_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors in a file of `torch.save`, by their path in its nest of dictionaries.

    Wrappers (`{"state_dict": ...}`) and optimiser states become prefixes of the names, as `state_dict.conv1.weight`.
    Nothing is executed: `weights_only=True`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is empty, damaged, holds Python objects, or no tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, but there is no file {path}.")
    if not path.stat().st_size:
        raise CheckpointError(f"Expected a checkpoint, but {path} is empty: copy it again.")
    if zipfile.is_zipfile(path) and (damaged := _damaged_members(path)):
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged[0]} in it is wrong. Copy it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about old formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except Exception as error:  # torch raises whatever its readers do on damaged bytes
        raise CheckpointError(
            f"Expected a file of torch.save, but {path} is damaged or something else ({type(error).__name__}): copy it "
            "again."
        ) from None
    tensors = _flat(content, "")
    if not tensors:
        raise CheckpointError(f"Expected a state dict, but {path} holds {type(content).__name__} without a tensor.")
    return tensors


def _damaged_members(path: Path) -> list[str]:
    """What in an archive fails its checksum, which torch itself does not look at; none if all do: it has none then."""
    damaged = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                try:
                    with archive.open(member) as file:
                        while file.read(2**20):
                            pass
                except zipfile.BadZipFile:
                    damaged.append(member.filename)
    except Exception:  # an archive whose table of contents is damaged: torch says so
        return [path.name]
    return damaged if len(damaged) < len(members) else []


def _refusal(path: Path, message: str) -> str:
    with path.open("rb") as file:
        cut_archive = file.read(2) == b"PK" and not zipfile.is_zipfile(path)
    if cut_archive or "global" not in message.lower():
        return f"Expected a file of torch.save, but {path} is damaged or something else: copy it again."
    return (
        f"Expected a state dict, but {path} holds Python objects, whose loading could run any code: where the project "
        "that wrote it is installed, do `torch.save(torch.load(path, weights_only=False).state_dict(), 'weights.pth')` "
        "(take the network out of the dictionary first, if it is one) and load that."
    )


def _flat(value: object, prefix: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix.removesuffix("."): value}
    if not isinstance(value, dict):
        return {}
    flat: dict[str, Tensor] = {}
    for key, item in value.items():
        # torch.compile inserts this module wherever it was applied.
        flat |= _flat(item, prefix + str(key).replace("_orig_mod.", "") + ".")
    return flat

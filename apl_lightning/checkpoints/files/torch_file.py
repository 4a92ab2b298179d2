"""Read the tensors in a file written by `torch.save`, without executing code from it."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from apl_lightning.checkpoints.error import CheckpointError


def read_torch_file(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors in a checkpoint, with `weights_only=True`.

    The keys of nested dictionaries are joined with dots, for example `state_dict.conv1.weight`. A file that is empty,
    damaged, or contains Python objects or no tensors is a `CheckpointError`, a missing one a `FileNotFoundError`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, but the file {path} does not exist.")
    if not path.stat().st_size:
        raise CheckpointError(f"Expected a checkpoint, but {path} is empty: copy it again.")
    if zipfile.is_zipfile(path) and (damaged := _damaged_members(path)):
        raise CheckpointError(
            f"Expected an intact file, but the checksum of {damaged[0]} in {path} is wrong: copy it again."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of errors on damaged files
        raise CheckpointError(_explanation(path, error)) from None
    tensors = _flatten(content, "")
    if not tensors:
        raise CheckpointError(f"Expected a state dict, but {path} contains a {type(content).__name__} without tensors.")
    return tensors


def _damaged_members(path: Path) -> list[str]:
    """Return the members of an archive with a wrong checksum, which torch does not check.

    Archives in which all checksums are wrong were written without checksums.
    """
    damaged = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                try:
                    archive.read(member)
                except zipfile.BadZipFile:
                    damaged.append(member.filename)
    except Exception:  # zipfile raises many types of errors on damaged archives
        return [path.name]
    return damaged if len(damaged) < len(members) else []


def _explanation(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        truncated = file.read(2) == b"PK" and not zipfile.is_zipfile(path)
    if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower() and not truncated:
        return (
            f"Expected a state dict, but {path} contains Python objects, which can execute code when loaded: in the "
            "project that wrote the file, take the network out of torch.load(path, weights_only=False), save it with "
            "torch.save(network.state_dict(), 'weights.pth'), and load that file."
        )
    return (
        f"Expected a file written by torch.save, but {path} is damaged or has another format "
        f"({type(error).__name__}): copy it again."
    )


def _flatten(value: object, prefix: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix.removesuffix("."): value}
    if not isinstance(value, dict):
        return {}
    tensors: dict[str, Tensor] = {}
    for key, item in value.items():
        # torch.compile adds this prefix to the keys of each compiled module.
        tensors |= _flatten(item, prefix + str(key).replace("_orig_mod.", "") + ".")
    return tensors

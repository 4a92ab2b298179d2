"""Read the tensors in a file written by `torch.save`, without executing code from it."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from apl_lightning._support.numpy_numbers import numpy_numbers
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files.nested import tensors_by_name
from apl_lightning.checkpoints.files.other_formats import describe_other_format


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors in a checkpoint, with `weights_only=True` and numbers of NumPy, as `tensors_by_name` names them.

    A file that is damaged, has another format, or contains Python objects or no tensors is a `CheckpointError`.
    """
    if other := describe_other_format(path):
        raise CheckpointError(f"Expected a file written by torch.save, but {path} {other}.")
    intact = zipfile.is_zipfile(path)
    if intact:
        _check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(numpy_numbers()):
            warnings.simplefilter("ignore")  # torch warns about old formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of errors on damaged files
        raise CheckpointError(_explanation(path, error, intact)) from None
    return tensors_by_name(content, path)


def _check_archive(path: Path) -> None:
    """Raise a `CheckpointError` if a member of an archive is compressed or has a wrong checksum.

    Torch stores members without compression and does not check their checksums. Archives in which all checksums are
    wrong were written without checksums.
    """
    damaged = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise CheckpointError(
                    f"Expected an archive without compression, as torch.save writes it, but the members of {path} are "
                    "larger than the file: load it with torch and save it again."
                )
            for member in members:
                try:
                    archive.read(member)
                except zipfile.BadZipFile:
                    damaged.append(member.filename)
    except CheckpointError:
        raise
    except Exception:  # zipfile raises many types of errors on damaged archives
        damaged, members = [path.name], []
    if damaged and len(damaged) != len(members):
        raise CheckpointError(
            f"Expected an intact file, but the checksum of {damaged[0]} in {path} is wrong: copy it again."
        )


def _explanation(path: Path, error: Exception, intact: bool) -> str:
    with path.open("rb") as file:
        truncated = file.read(2) == b"PK" and not intact
    if isinstance(error, pickle.UnpicklingError) and (intact or "global" in str(error).lower()) and not truncated:
        return (
            f"Expected a state dict, but {path} contains Python objects ({_objects(path, error)}), which can execute "
            "code when loaded: if you trust the file, load it once with torch.load(path, weights_only=False), save "
            "the state dict in it alone with torch.save(state_dict, 'weights.pth') (of a whole network: "
            "network.state_dict()), and load that file."
        )
    return (
        f"Expected a file written by torch.save, but {path} is damaged or has another format "
        f"({type(error).__name__}): copy it again."
    )


def _objects(path: Path, error: Exception) -> str:
    """Name the types and functions in a file that torch does not load, or its other reason not to load it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads intact archives only
        names = re.findall(r"GLOBAL (\S+)", str(error))
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return ", ".join(sorted(set(names))[:5]) or (reason[1] if reason else type(error).__name__)

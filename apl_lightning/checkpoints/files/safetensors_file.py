"""Read the tensors in a `.safetensors` file."""

import struct
from pathlib import Path

from torch import Tensor

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files.nested import tensors_by_name


def is_safetensors(path: Path) -> bool:
    """Return whether a file starts with the size and the first character of a header of safetensors."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= path.stat().st_size


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors in a file; a `CheckpointError` if it is damaged or the package safetensors is missing."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(
            f"Expected the package safetensors to read {path}, but it is not installed: pip install safetensors."
        ) from None
    try:
        content = load_file(path)
    except Exception as error:  # safetensors raises its own error, and others for types that torch lacks
        raise CheckpointError(
            f"Expected an intact .safetensors file, but {path} is damaged ({error}): copy it again."
        ) from None
    return tensors_by_name(content, path)

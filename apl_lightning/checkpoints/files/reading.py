"""Read the tensors in a file of any supported format."""

from pathlib import Path

from torch import Tensor

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files.safetensors_file import is_safetensors, read_safetensors
from apl_lightning.checkpoints.files.sifa_bundle import read_sifa_bundle
from apl_lightning.checkpoints.files.tensorflow_bundle import is_bundle
from apl_lightning.checkpoints.files.torch_file import read_torch_file


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors in a TensorFlow bundle, a `.safetensors` file or a torch file, by name.

    A file that cannot be read is a `CheckpointError`, a missing one a `FileNotFoundError`.
    """
    path = Path(path).expanduser()
    if is_bundle(path):
        return read_sifa_bundle(path)
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file())
        raise CheckpointError(
            f"Expected a file or the folder of a TensorFlow checkpoint, but {path} is a folder without an .index file: "
            f"pass one of its files ({', '.join(names[:5]) or 'it has none'})."
        )
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, but the file {path} does not exist.")
    if not path.stat().st_size:
        raise CheckpointError(f"Expected a checkpoint, but {path} is empty: copy it again.")
    return read_safetensors(path) if is_safetensors(path) else read_torch_file(path)

"""Recognize files that users take for a checkpoint of torch or TensorFlow, and tell how to convert them."""

import re
import struct
import tarfile
import zipfile
from pathlib import Path

from apl_lightning.checkpoints.files.leveldb import MAGIC

# How a file starts, what it is, and what to do.
_STARTS = (
    (rb"(\xef\xbb\xbf)?\s*<", "a web page", "download the file itself and not the page that shows it"),
    (rb"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull` in its repository"),
    (rb"\x1f\x8b", "a gzip archive", "extract it"),
    (rb"\x80[\x03-\x05]", "a pickle file of protocol 3 or newer", "load it where it was written and use torch.save"),
)


def describe_other_format(path: Path) -> str:
    """Say what a file is and what to do, in the form "is X: do Y"; an empty string if the format is not recognized."""
    with path.open("rb") as file:
        start = file.read(64)
        file.seek(-min(8, path.stat().st_size), 2)
        end = file.read()
    for pattern, kind, cure in _STARTS:
        if re.match(pattern, start):
            return f"is {kind}: {cure}"
    if found := re.fullmatch(r"(.+)\.(meta|data-\d+-of-\d+)", path.name):
        part = "graph" if found[2] == "meta" else "data"
        return f"is the {part} of a TensorFlow checkpoint without its index: copy {found[1]}.index beside it"
    if end == struct.pack("<Q", MAGIC):
        return (
            "is a TensorFlow checkpoint in the old format V1: restore it in TensorFlow 1 and save it with "
            "tf.train.Saver(write_version=tf.train.SaverDef.V2)"
        )
    if zipfile.is_zipfile(path):
        return _describe_zip(path)
    return "is a tar archive: extract it" if tarfile.is_tarfile(path) else ""


def _describe_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many types of errors on damaged archives
        return ""
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "is a TorchScript archive: convert it with "
            "torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pth')"
        )
    if names and all(name.endswith(".npy") for name in names):
        return (
            "is a NumPy archive: convert it with "
            "torch.save({k: torch.from_numpy(v) for k, v in np.load(path).items()}, 'weights.pth')"
        )
    return "" if any(name.endswith("/data.pkl") for name in names) else "is a zip archive of other files: extract it"

"""Files that appear whole or not at all, and files that show whether they have changed since."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import nn


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a hidden file beside `path`, and rename it to `path` at the end: readers never see a part."""
    unfinished = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def explaining_disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Add to an `OSError` what could not be written to the folder of a round, and the cure."""
    try:
        yield
    except OSError as error:
        cure = "free some space or pass another `store_dir` (or `out`)"
        raise OSError(error.errno, f"{error.strerror} while writing {what} to {folder}: {cure}") from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder for the results of one run; a `ValueError` if another one works there."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / ".running"
    try:
        mark.open("x").close()
    except FileExistsError as error:
        raise ValueError(
            f"Expected a folder of its own for `out`, but a run works in {folder}: name another."
        ) from error
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def new_folder(path: str | Path) -> Path:
    """The path of a folder for results, which is not made here; a `ValueError` if there is something."""
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"Expected `out` to be a new or an empty folder, but {path} has content: name another one.")
    return path


def new_file(path: str | Path) -> Path:
    """The path of a file for results, which is not made here; a `FileExistsError` if it exists."""
    path = Path(path).expanduser()
    if path.exists():
        raise FileExistsError(f"Expected a new file, but {path} exists: name another one.")
    return path


def save(content: Any, path: Path) -> None:
    """`torch.save` of a whole file; an `OSError` with its cause and the cure."""
    # With a path in place of a file, torch hides the reason of an error.
    with explaining_disk_errors(path.parent, path.name), replacing(path) as unfinished, unfinished.open("wb") as file:
        torch.save(content, file)


def save_weights(network: nn.Module, path: Path) -> None:
    """Save the state dict of a network."""
    save(network.state_dict(), path)


def write_checked(path: Path, content: bytes) -> int:
    """Write a file with its checksum at the end; returns the checksum."""
    checksum: int = google_crc32c.value(content)
    with replacing(path) as unfinished:
        unfinished.write_bytes(content + checksum.to_bytes(4, "big"))
    return checksum


def read_checked(path: Path, expected: int | None = None) -> bytes:
    """Read a file of `write_checked`; an `OSError` if it is missing, has changed or has not the expected checksum."""
    content = path.read_bytes()
    content, end = content[:-4], content[-4:]
    checksum = google_crc32c.value(content)
    if checksum.to_bytes(4, "big") != end or expected not in (None, checksum):
        raise OSError(0, "its checksum differs")
    return content

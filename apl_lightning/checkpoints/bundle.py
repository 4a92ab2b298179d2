"""Read TensorFlow's V2 checkpoints (`.index` and `.data-*`), without TensorFlow and without pickle."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apl_lightning.checkpoints.crc32c import masked_crc32c
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.leveldb import read_table, varint

_LARGEST_INDEX = 64 * 2**20
# The numbers of tensorflow/core/framework/types.proto that NumPy has a type for.
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 19: "<f2", 22: "<u4", 23: "<u8"}


class Entry(NamedTuple):
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class Bundle:
    """A checkpoint of TensorFlow's `Saver`: names and shapes at once, values on demand.

    Args:
        path: The common prefix (`sifa-299`), one of its files, or a folder with a `checkpoint` file.

    Attributes:
        entries: Where each tensor lies, by name.

    Raises:
        FileNotFoundError: If there is no index.
        CheckpointError: If the index is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = _prefix(Path(path))
        index = self.prefix.with_name(f"{self.prefix.name}.index")
        if not index.is_file():
            raise FileNotFoundError(f"Expected the index of a TensorFlow checkpoint, but there is no {index}.")
        try:
            if index.stat().st_size > _LARGEST_INDEX:
                raise CheckpointError(f"it is larger than {_LARGEST_INDEX} bytes")
            table = read_table(index.read_bytes())
            self.shards = _shards(table.pop(b"", b""))
            self.entries = {_text(name): _entry(value) for name, value in table.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{index} is damaged: {error}. Copy it again.") from None

    def read(self, name: str) -> NDArray[Any]:
        """The values of a tensor, its checksum verified.

        Raises:
            CheckpointError: If its data is missing, damaged, or of a kind that NumPy does not have.
        """
        entry = self.entries[name]
        if entry.dtype not in _TYPES or entry.sliced:
            kind = "is partitioned" if entry.sliced else f"has type number {entry.dtype}"
            raise CheckpointError(f"Expected numbers in one piece, but {name!r} in {self.prefix} {kind}.")
        dtype = np.dtype(_TYPES[entry.dtype])
        shard = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05d}-of-{self.shards:05d}")
        if not shard.is_file():
            raise CheckpointError(f"Expected {shard} beside the index, but it is missing: copy it too.")
        if entry.size != math.prod(entry.shape) * dtype.itemsize or entry.offset + entry.size > shard.stat().st_size:
            raise CheckpointError(
                f"{shard} is too short for {name!r}, or the index is of another one: copy both again."
            )
        with shard.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        if masked_crc32c(data) != entry.crc:
            raise CheckpointError(f"{shard} is damaged: the checksum of {name!r} is wrong. Copy it again.")
        return np.frombuffer(data, dtype).reshape(entry.shape)


def is_bundle(path: str | Path) -> bool:
    """Whether a path names a bundle: a prefix, one of its files, or a folder with one."""
    prefix = _prefix(Path(path))
    return prefix.with_name(f"{prefix.name}.index").is_file()


def _prefix(path: Path) -> Path:
    if path.is_dir():
        pointer = path / "checkpoint"
        text = pointer.read_text(errors="replace") if pointer.is_file() else ""
        found = re.search(r'^model_checkpoint_path: "([^"]+)"', text, re.MULTILINE)
        # Training writes an absolute path, which is another machine's by now.
        return path / Path(found[1].replace("\\", "/")).name if found else path / "checkpoint"
    return path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"a name is no text: {name[:40]!r}") from None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: their number, and an integer or bytes."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise CheckpointError(f"a field has the unknown kind {kind}")
        if at + size > len(message):
            raise CheckpointError("a field lies outside of its message")
        data = message[at : at + size]
        yield number, data if kind == 2 else int.from_bytes(data, "little")
        at += size


def _shards(header: bytes) -> int:
    """The number of data files, from a BundleHeaderProto."""
    fields = dict(_fields(header))
    if fields.get(2, 0) != 0:
        raise CheckpointError("it was written on a big-endian machine")
    shards = fields.get(1, 0)
    if not isinstance(shards, int) or not 1 <= shards < 100_000:
        raise CheckpointError("its header names no data files")
    return shards


def _entry(message: bytes) -> Entry:
    """A BundleEntryProto."""
    numbers = dict.fromkeys((1, 3, 4, 5, 6), 0)
    shape, sliced = b"", False
    for number, value in _fields(message):
        if number in numbers and isinstance(value, int):
            numbers[number] = value
        elif number == 2 and isinstance(value, bytes):
            shape = value
        elif number in (1, 2, 3, 4, 5, 6):
            raise CheckpointError("a field of an entry is of another kind")
        sliced = sliced or number == 7
    dtype, shard, offset, size, crc = numbers.values()
    return Entry(dtype, _shape(shape), shard, offset, size, crc, sliced)


def _shape(message: bytes) -> tuple[int, ...]:
    """A TensorShapeProto."""
    shape: list[int] = []
    for number, dimension in _fields(message):
        if number == 2 and isinstance(dimension, bytes):
            size = dict(_fields(dimension)).get(1, 0)
            if not isinstance(size, int) or size >= 2**40 or len(shape) == 8:
                raise CheckpointError("a shape makes no sense")
            shape.append(size)
    return tuple(shape)

"""Read TensorFlow V2 checkpoints (`.index` and `.data-*` files) without TensorFlow and without pickle."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files.leveldb import masked_crc32c, read_table, varint

_MAX_INDEX_SIZE = 64 * 2**20
# The numbers in tensorflow/core/framework/types.proto of the types that NumPy supports.
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 19: "<f2", 22: "<u4", 23: "<u8"}
_Fields = Mapping[int, int | bytes]


class _Entry(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class Bundle:
    """A checkpoint of TensorFlow's `Saver`, which reads names and shapes (`entries`) at once and values on demand.

    The path is the prefix of the files (`sifa-299`), one of the files, or a folder; `_prefix` selects one of several
    checkpoints in a folder. A damaged index is a `CheckpointError`, a missing one a `FileNotFoundError`.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = _prefix(Path(path))
        index = self.prefix.with_name(f"{self.prefix.name}.index")
        if not index.is_file():
            raise FileNotFoundError(f"Expected the index of a TensorFlow checkpoint, but {index} does not exist.")
        try:
            if index.stat().st_size > _MAX_INDEX_SIZE:
                raise CheckpointError(f"it is larger than {_MAX_INDEX_SIZE} bytes")
            table = read_table(index.read_bytes())
            self.shards = _num_shards(table.pop(b"", b""))
            self.entries = {name.decode(): _entry(value) for name, value in table.items()}
            _check_overlap(self.entries.values())
        except (CheckpointError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"Expected an intact index, but {index} is damaged ({error}): copy it again."
            ) from None

    def read(self, name: str) -> NDArray[Any]:
        """The values of a tensor; a `CheckpointError` if they are missing, damaged or of an unsupported type."""
        entry = self.entries[name]
        if entry.dtype not in _TYPES or entry.sliced:
            kind = "is partitioned" if entry.sliced else f"has type number {entry.dtype}"
            raise CheckpointError(f"Expected an unpartitioned numeric tensor, but {name!r} in {self.prefix} {kind}.")
        dtype = np.dtype(_TYPES[entry.dtype])
        shard = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05d}-of-{self.shards:05d}")
        if not shard.is_file():
            raise CheckpointError(f"Expected {shard} beside the index, but it does not exist: copy it too.")
        if entry.size != math.prod(entry.shape) * dtype.itemsize or entry.offset + entry.size > shard.stat().st_size:
            raise CheckpointError(
                f"Expected {entry.size} bytes of {name!r}, but {shard} is too short or does not match the index: copy "
                "both files again."
            )
        with shard.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        if masked_crc32c(data) != entry.crc:
            raise CheckpointError(
                f"Expected intact data, but the checksum of {name!r} in {shard} is wrong: copy it again."
            )
        return np.frombuffer(data, dtype).reshape(entry.shape)


def is_bundle(path: str | Path) -> bool:
    """Return whether a path is the prefix of a bundle, one of its files, or a folder that contains one."""
    prefix = _prefix(Path(path))
    return prefix.with_name(f"{prefix.name}.index").is_file()


def _prefix(path: Path) -> Path:
    """The prefix of a checkpoint: in a folder, the one that the file `checkpoint` names, or else the only one."""
    if not path.is_dir():
        return path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))
    prefixes = sorted(index.with_suffix("") for index in path.glob("*.index"))
    named = [prefix for prefix in prefixes if prefix.name == _newest(path / "checkpoint")]
    if len(prefixes) > 1 and not named:
        names = [prefix.name for prefix in prefixes]
        raise CheckpointError(
            f"Expected one checkpoint, but {path} contains {len(names)}, and its file `checkpoint` names none of them: "
            f"pass {path / names[-1]} or another of {', '.join(names[:5])}."
        )
    return (named or prefixes or [path / "checkpoint"])[0]


def _newest(pointer: Path) -> str:
    """Read the name of the newest checkpoint, whose stored path is often of the machine that trained the network."""
    if not pointer.is_file():
        return ""
    with pointer.open(errors="replace") as file:
        found = re.search(r'^model_checkpoint_path: "([^"]+)"', file.read(10_000), re.MULTILINE)
    return found[1].replace("\\", "/").split("/")[-1] if found else ""


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a protocol buffer."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = varint(message, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = varint(message, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise CheckpointError(f"a field has the unknown wire type {wire_type}")
        if at + size > len(message):
            raise CheckpointError("a field extends past the end of its message")
        data = message[at : at + size]
        yield number, data if wire_type == 2 else int.from_bytes(data, "little")
        at += size


def _integer(fields: _Fields, number: int) -> int:
    value = fields.get(number, 0)
    if not isinstance(value, int):
        raise CheckpointError(f"field {number} is not an integer")
    return value


def _num_shards(header: bytes) -> int:
    """Read the number of data files from a BundleHeaderProto."""
    fields = dict(_fields(header))
    if _integer(fields, 2):
        raise CheckpointError("it is big-endian, which is not supported")
    shards = _integer(fields, 1)
    if not 1 <= shards < 100_000:
        raise CheckpointError(f"its header specifies {shards} data files")
    return shards


def _entry(message: bytes) -> _Entry:
    """Read a BundleEntryProto."""
    fields = dict(_fields(message))
    dtype, shard, offset, size, crc = (_integer(fields, number) for number in (1, 3, 4, 5, 6))
    return _Entry(dtype, _shape(fields.get(2, b"")), shard, offset, size, crc, sliced=7 in fields)


def _shape(message: int | bytes) -> tuple[int, ...]:
    """Read a TensorShapeProto."""
    if not isinstance(message, bytes):
        raise CheckpointError("a shape is not a message")
    dimensions = [value for number, value in _fields(message) if number == 2 and isinstance(value, bytes)]
    shape = tuple(_integer(dict(_fields(dimension)), 1) for dimension in dimensions)
    if len(shape) > 8 or math.prod(max(size, 1) for size in shape) >= 2**40:
        raise CheckpointError("a shape is too large")
    return shape


def _check_overlap(entries: Iterable[_Entry]) -> None:
    """Raise a `CheckpointError` if two tensors share bytes, so that all of them are not larger than the files."""
    ends: dict[int, int] = {}
    for entry in sorted(entries, key=lambda entry: (entry.shard, entry.offset)):
        if entry.size and entry.offset < ends.get(entry.shard, 0):
            raise CheckpointError("two tensors overlap")
        ends[entry.shard] = max(ends.get(entry.shard, 0), entry.offset + entry.size)

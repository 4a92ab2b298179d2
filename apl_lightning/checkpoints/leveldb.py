"""Read a LevelDB table, the format of a bundle's `.index`, without trusting a byte of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from apl_lightning.checkpoints.crc32c import masked_crc32c
from apl_lightning.checkpoints.error import CheckpointError

_FOOTER = 48
_MAGIC = 0xDB4775248B80FB57
# Far above any model, and what bounds memory and time on a damaged file.
_MOST_ENTRIES = 100_000
_LONGEST_KEY = 1_000


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The variable-length integer at a position, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise CheckpointError("an integer does not end")


def read_table(data: bytes) -> dict[bytes, bytes]:
    """All entries of a table, its checksums verified.

    Raises:
        CheckpointError: If the bytes are no table, or a damaged or compressed one.
    """
    if len(data) < _FOOTER:
        raise CheckpointError(f"{len(data)} bytes are too few for an index")
    footer = data[-_FOOTER:]
    if struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise CheckpointError("it does not end as an index of TensorFlow does")
    _, at = varint(footer, 0)
    _, at = varint(footer, at)
    index = _block(data, footer[at:])
    entries: dict[bytes, bytes] = {}
    end = 0
    for _, handle in _entries(index):
        offset, _ = varint(handle, 0)
        if offset < end:
            raise CheckpointError("its blocks overlap")
        block = _block(data, handle)
        end = offset + len(block)
        for key, value in _entries(block):
            if len(entries) == _MOST_ENTRIES:
                raise CheckpointError(f"it has more than {_MOST_ENTRIES} entries")
            entries[key] = value
    return entries


def _block(data: bytes, handle: bytes) -> bytes:
    offset, at = varint(handle, 0)
    size, _ = varint(handle, at)
    end = offset + size
    if end + 5 > len(data):
        raise CheckpointError("a block lies outside of the file")
    stored = struct.unpack("<I", data[end + 1 : end + 5])[0]
    if masked_crc32c(data[offset : end + 1]) != stored:
        raise CheckpointError("the checksum of a block is wrong")
    if data[end]:
        raise CheckpointError("a block is compressed, which TensorFlow does not do")
    return data[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a block; each key is stored as what it does not share with the one before."""
    if len(block) < 4:
        raise CheckpointError("a block is too short")
    restarts = struct.unpack("<I", block[-4:])[0]
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise CheckpointError("a block is too short")
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        fresh, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or shared + fresh > _LONGEST_KEY or at + fresh + length > end:
            raise CheckpointError("an entry lies outside of its block")
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        yield key, block[at : at + length]
        at += length

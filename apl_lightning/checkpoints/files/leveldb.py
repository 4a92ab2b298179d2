"""Read LevelDB tables, the format of the `.index` file of a TensorFlow bundle, and check all lengths and checksums."""

import struct
from collections.abc import Iterator

import google_crc32c

from apl_lightning.checkpoints.error import CheckpointError

_FOOTER_SIZE = 48
MAGIC = 0xDB4775248B80FB57
# These limits are far above any real checkpoint. They bound memory and time on damaged files.
_MAX_ENTRIES = 100_000
_MAX_KEY_LENGTH = 1_000


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C of bytes, rotated and offset as LevelDB and TensorFlow store it."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode the variable-length integer at a position; return it and the next position."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise CheckpointError("an integer is not terminated")


def read_table(data: bytes) -> dict[bytes, bytes]:
    """All entries of a table; a `CheckpointError` if the bytes are not a table, or it is damaged or compressed."""
    if len(data) < _FOOTER_SIZE:
        raise CheckpointError(f"{len(data)} bytes are too few for an index")
    footer = data[-_FOOTER_SIZE:]
    if struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise CheckpointError("the magic number at the end is wrong")
    _, at = varint(footer, 0)
    _, at = varint(footer, at)
    entries: dict[bytes, bytes] = {}
    end = 0
    for _, handle in _entries(_block(data, footer[at:])):
        offset, _ = varint(handle, 0)
        if offset < end:
            raise CheckpointError("two blocks overlap")
        block = _block(data, handle)
        end = offset + len(block)
        for key, value in _entries(block):
            if len(entries) == _MAX_ENTRIES:
                raise CheckpointError(f"it has more than {_MAX_ENTRIES} entries")
            entries[key] = value
    return entries


def _block(data: bytes, handle: bytes) -> bytes:
    offset, at = varint(handle, 0)
    size, _ = varint(handle, at)
    end = offset + size
    if end + 5 > len(data):
        raise CheckpointError("a block extends past the end of the file")
    if masked_crc32c(data[offset : end + 1]) != struct.unpack("<I", data[end + 1 : end + 5])[0]:
        raise CheckpointError("the checksum of a block is wrong")
    if data[end]:
        raise CheckpointError("a block is compressed, which is not supported")
    return data[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block; each stored key omits the prefix that it shares with the previous key."""
    restarts = struct.unpack("<I", block[-4:])[0] if len(block) >= 4 else 0
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise CheckpointError("a block is too short")
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or shared + unshared > _MAX_KEY_LENGTH or at + unshared + length > end:
            raise CheckpointError("an entry extends past the end of its block")
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length

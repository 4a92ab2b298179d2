"""CRC-32C (Castagnoli), which guards TensorFlow's bundles, many bytes at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
_LANES = 1 << 12
# Below this, setting up the lanes costs more than they save.
_SHORT = 1 << 17
_Words = NDArray[np.uint32]


def _byte_table() -> _Words:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


_TABLE = _byte_table()
_LIST = _TABLE.tolist()


def _apply(columns: _Words, words: _Words) -> _Words:
    """A linear map of 32 bits, given by what it makes of each bit, on many words."""
    result = np.zeros_like(words)
    for bit, column in enumerate(columns):
        result ^= np.where((words >> np.uint32(bit)) & 1, column, 0).astype(np.uint32)
    return result


def _zero_bytes(count: int) -> _Words:
    """The map of the register over `count` zero bytes, by repeated squaring."""
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    square = _TABLE[result & 0xFF] ^ (result >> np.uint32(8))
    while count:
        if count & 1:
            result = _apply(square, result)
        square, count = _apply(square, square), count >> 1
    return result


def crc32c(data: bytes) -> int:
    """The checksum of `data`.

    The register is linear, so the data is cut into equal lanes that run side by side, and neighbours are joined by
    moving the left one over the length of the right one.

    Examples:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    state, done = 0xFFFFFFFF, 0
    if len(data) >= _SHORT:
        done = len(data) // _LANES * _LANES
        state = _side_by_side(np.frombuffer(data, np.uint8, done).reshape(_LANES, -1))
    for byte in data[done:]:
        state = _LIST[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def _side_by_side(body: NDArray[np.uint8]) -> int:
    """The register after all lanes (rows), which follow each other in the data."""
    register = np.zeros(len(body), np.uint32)
    register[0] = 0xFFFFFFFF
    for column in body.T:
        register = _TABLE[(register ^ column) & 0xFF] ^ (register >> np.uint32(8))
    move = _zero_bytes(body.shape[1])
    while len(register) > 1:
        register = _apply(move, register[0::2]) ^ register[1::2]
        move = _apply(move, move)
    return int(register[0])


def masked_crc32c(data: bytes) -> int:
    """The checksum as LevelDB and TensorFlow store it: rotated and shifted, so that a checksum of one differs."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

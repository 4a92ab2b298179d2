"""Write checkpoints in the formats of the seven systems, with the reproducible weights of the golden fixtures."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apl_lightning.checkpoints.files.leveldb import masked_crc32c

GOLDEN = Path(__file__).parents[1] / "golden"
Arrays = dict[str, NDArray[Any]]


def fill(key: str, shape: tuple[int, ...], gain: float, seed: int = 1) -> NDArray[Any]:
    """Draw the values of one tensor in float64, with a random generator that is seeded by its name.

    The name and the shape select the distribution; the first rule that matches is used.
    """
    generator = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith(("running_var", "moving_variance")) or (len(shape) == 1 and key.endswith(("weight", "gamma"))):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    vector = len(shape) == 1 and key.endswith(("bias", "biases", "beta"))
    if vector or key.endswith(("running_mean", "moving_mean")):
        return (0.1 * generator.normal(size=shape)).astype(np.float32)
    fan_in = math.prod(shape[:-1] if "/" in key else shape[1:])
    return (generator.normal(size=shape) * (gain * np.sqrt(2.0 / fan_in))).astype(np.float32)


def image(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Return smooth noise in [-1, 1] in steps of 1/1024: normal noise after two 5 x 5 box filters."""
    noise = np.random.default_rng(zlib.crc32(f"{seed}:image".encode())).normal(size=shape)
    for axis in (-2, -1, -2, -1):
        noise = sum(np.roll(noise, shift, axis) for shift in (-2, -1, 0, 1, 2)) / 5.0
    return torch.from_numpy((np.round(noise / np.abs(noise).max() * 1024) / 1024).astype(np.float32))


class Golden:
    """A golden fixture: its metadata, the outputs of the official network, and its weights."""

    def __init__(self, name: str) -> None:
        self.facts = json.loads((GOLDEN / f"{name}.json").read_text())
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            self.outputs = {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def image(self) -> Tensor:
        batch, *rest = self.facts["input"]["shape"]
        shape = (batch, *rest) if self.facts["input"]["layout"] == "NCHW" else (batch, rest[-1], *rest[:-1])
        return image(shape)

    def arrays(self, keys: str = "keys", prefix: str = "") -> Arrays:
        gain, fixed = self.facts["fill"]["gain"], ("upscore2.w", "upscore_pool4.w", "upscore8.w")
        shapes = {key: tuple(shape) for key, shape in self.facts[keys].items() if key not in fixed}
        return {key: fill(prefix + key, shape, gain) for key, shape in shapes.items()}

    def state_dict(self, keys: str = "keys", prefix: str = "") -> dict[str, Tensor]:
        return {key: torch.from_numpy(array) for key, array in self.arrays(keys, prefix).items()}

    def digest(self) -> str:
        digest, arrays = hashlib.sha256(), self.arrays()
        for key in sorted(arrays):
            digest.update(key.encode() + b"\0" + arrays[key].tobytes())
        return digest.hexdigest()


def varint(value: int) -> bytes:
    data = b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    data = b""
    for number, value in fields:
        if isinstance(value, int):
            data += varint(number << 3) + varint(value)
        else:
            data += varint(number << 3 | 2) + varint(len(value)) + value
    return data


def block(entries: dict[bytes, bytes]) -> bytes:
    """Encode a block of a LevelDB table with sorted, prefix-compressed entries and one restart point."""
    data, previous = b"", b""
    for key, value in sorted(entries.items()):
        shared = next((i for i, (a, b) in enumerate(zip(key, previous, strict=False)) if a != b), len(previous))
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return data + struct.pack("<II", 0, 1)


def table(blocks: list[bytes], references: int = 1) -> bytes:
    """Encode a LevelDB table with correct checksums from data blocks, which may be invalid.

    The index refers to each block `references` times; valid tables have one reference.
    """
    data = b""

    def append(content: bytes) -> bytes:
        nonlocal data
        handle = varint(len(data)) + varint(len(content))
        content += b"\0"
        data += content + struct.pack("<I", masked_crc32c(content))
        return handle

    handles = [append(content) for content in blocks]
    index = append(block({f"{i:08d}".encode(): handle for i, handle in enumerate(handles * references)}))
    footer = (append(block({})) + index).ljust(40, b"\0")
    return data + footer + struct.pack("<Q", 0xDB4775248B80FB57)


TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9}


def entry(array: NDArray[Any], offset: int, data: bytes) -> bytes:
    dimensions = [(2, _message((1, size))) for size in array.shape]
    fields = [(1, TYPES[array.dtype.name]), (2, _message(*dimensions)), (4, offset), (5, len(data))]
    return _message(*fields) + varint(6 << 3 | 5) + struct.pack("<I", masked_crc32c(data))


HEADER = _message((1, 1), (3, _message((1, 1))))


def write_bundle(prefix: Path, arrays: Arrays) -> Path:
    """Write a V2 checkpoint like TensorFlow's `Saver` and return its prefix."""
    entries, offset = {b"": HEADER}, 0
    with prefix.with_name(f"{prefix.name}.data-00000-of-00001").open("wb") as file:
        for name in sorted(arrays):
            data = arrays[name].tobytes()
            file.write(data)
            entries[name.encode()] = entry(arrays[name], offset, data)
            offset += len(data)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table([block(entries)]))
    prefix.with_name("checkpoint").write_text(f'model_checkpoint_path: "/absolute/path/{prefix.name}"\n')
    return prefix


def write_sifa(folder: Path, golden: Golden) -> Path:
    """Write a bundle like SIFA: the segmenter, the generator, the other networks and the optimizer state."""
    arrays = {**golden.arrays(), **golden.arrays("keys_g_A")}
    arrays |= {name: np.zeros(shape, np.float32) for name, shape in golden.facts["also"].items()}
    slots = [name for name in arrays if name.endswith(("c1/Conv/weights", "gamma"))]
    arrays |= {f"{name}/{slot}": np.zeros_like(arrays[name]) for name in slots for slot in ("Adam", "Adam_1")}
    arrays |= {"beta1_power": np.array(0.5, np.float32), "global_step": np.array(7, np.int64)}
    return write_bundle(folder / "sifa-299", arrays)

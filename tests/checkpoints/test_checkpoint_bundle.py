"""The reader of TensorFlow bundles returns exact values and rejects damaged files."""

from __future__ import annotations

import random
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import GOLDEN, HEADER, block, entry, table, varint, write_bundle

from apl_lightning.checkpoints import CheckpointError
from apl_lightning.checkpoints.files.leveldb import masked_crc32c, read_table
from apl_lightning.checkpoints.files.tensorflow_bundle import Bundle, is_bundle

TINY = GOLDEN / "tiny_sifa_bundle"


def test_file_of_tensorflow_is_read_exactly() -> None:
    bundle = Bundle(TINY)
    with np.load(GOLDEN / "tiny_sifa_bundle_expected.npz") as expected:
        assert set(bundle.entries) == set(expected.files)
        for name in expected.files:
            ours = bundle.read(name)
            assert (ours.dtype, ours.shape) == (expected[name].dtype, expected[name].shape)
            assert ours.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("name", ["", "sifa-299", "sifa-299.index", "sifa-299.data-00000-of-00001", "sifa-299.meta"])
def test_bundle_is_found_by_each_of_its_paths(name: str) -> None:
    assert is_bundle(TINY / name)
    assert len(Bundle(TINY / name).entries) == 57


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_checksum_is_the_masked_crc32c(data: bytes, crc: int) -> None:
    """The CRCs are from RFC 3720, B.4; unmasking is the inverse in LevelDB's `crc32c.h`."""
    rotated = (masked_crc32c(data) - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == crc


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "bundle")
    return tmp_path / "bundle" / "sifa-299"


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def test_damaged_data_is_explained(tiny: Path) -> None:
    name, shard = "Model/e_B/c1/Conv/weights", tiny.with_suffix(".data-00000-of-00001")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"bytes of 'Model/e_B/c1/Conv/weights', but .*data-00000-of-00001 is too short"
    ):
        Bundle(tiny).read(name)
    shutil.copy(TINY / shard.name, shard)
    change(shard, lambda data: data.__setitem__(5, data[5] ^ 1))
    with pytest.raises(
        CheckpointError, match="the checksum of 'Model/e_B/c1/Conv/weights' in .* is wrong: copy it again"
    ):
        Bundle(tiny).read(name)
    shard.unlink()
    with pytest.raises(CheckpointError, match="data-00000-of-00001 beside the index, but it does not exist"):
        Bundle(tiny).read(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (bytes(100), "the magic number at the end is wrong"),
        (table([block({b"": HEADER})]).replace(HEADER, HEADER[::-1]), "the checksum of a block is wrong"),
        (table([block({b"": HEADER})])[20:], "past the end of the file|checksum"),
        (table([block({b"": HEADER})], references=2), "two blocks overlap"),
        (table([block({b"": varint(2 << 3) + varint(1)})]), "big-endian"),
        (table([block({b"": b""})]), "header specifies 0 data files"),
        (table([block({b"": HEADER, b"\xff": b""})]), "can't decode byte 0xff"),
        (table([block({b"": HEADER, b"a": varint(2 << 3) + varint(1)})]), "a shape is not a message"),
        (table([block({b"": HEADER, b"a": b"\x80"})]), "an integer is not terminated"),
        (table([block({b"": HEADER, b"a": b"\x13"})]), "unknown wire type 3"),
        (table([block({b"": HEADER, b"a": b"\x12\x7f"})]), "past the end of its message"),
        (table([block({b"": HEADER, b"k" * 2000: b""})]), "past the end of its block"),
        (table([b"\0"]), "a block is too short"),
        (table([struct.pack("<I", 1000)]), "a block is too short"),
        (table([block({f"{i:06d}".encode(): b"" for i in range(100_001)})]), "more than 100000 entries"),
        (table([block({b"": HEADER, b"a": varint(1 << 3 | 2) + varint(0)})]), "field 1 is not an integer"),
    ],
    ids=range(17),
)
def test_bad_index_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.index").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"intact index, but .*x\.index is damaged \(.*({message})"):
        Bundle(tmp_path / "x")


def test_unsupported_tensors_are_explained_when_they_are_read(tmp_path: Path) -> None:
    text = varint(1 << 3) + varint(7)
    sliced = entry(np.zeros(2, np.float32), 0, bytes(8)) + varint(7 << 3 | 2) + varint(0)
    index = table([block({b"": HEADER, b"text": text, b"sliced": sliced})])
    (tmp_path / "x.index").write_bytes(index)
    bundle = Bundle(tmp_path / "x")
    with pytest.raises(CheckpointError, match="'text' in .* has type number 7"):
        bundle.read("text")
    with pytest.raises(CheckpointError, match="'sliced' in .* is partitioned"):
        bundle.read("sliced")


def test_written_bundle_is_read_exactly(tmp_path: Path) -> None:
    arrays = {
        "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a/c": np.array(7, np.int64),
        "z": np.zeros((0, 4), np.float64),
    }
    bundle = Bundle(write_bundle(tmp_path / "model-1", arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(bundle.read(name), array)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Replace, remove, insert or repeat some bytes."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(result) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(result):
            result[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind == 1:
            del result[at : at + chance.choice((1, 4, 100))]
        elif kind == 2:
            result[at:at] = chance.randbytes(chance.choice((1, 4, 10)))
        else:
            result[at:at] = result[at : at + chance.randint(1, 50)]
    return bytes(result)


@pytest.mark.parametrize("repaired", [False, True], ids=["wrong checksums", "correct checksums"])
def test_fuzzed_bundles_raise_only_one_error(tiny: Path, repaired: bool) -> None:
    """Random damage leads to a valid result or a CheckpointError, in bounded memory."""
    chance = random.Random(3)
    index, original = tiny.with_suffix(".index"), (TINY / "sifa-299.index").read_bytes()
    inner = block(read_table(original))
    tracemalloc.start()
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1000):
        index.write_bytes(table([mutated(inner, chance)]) if repaired else mutated(original, chance))
        try:
            bundle = Bundle(tiny)
            for name in bundle.entries:
                bundle.read(name)
            outcomes["read"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcomes["refused"] > 300
    assert peak < 8 * 2**20


def test_huge_shapes_do_not_allocate_memory(tmp_path: Path) -> None:
    dimension = varint(1 << 3) + varint(2**39)
    shape = b"".join(varint(2 << 3 | 2) + varint(len(dimension)) + dimension for _ in range(8))
    claim = varint(1 << 3) + varint(1) + varint(2 << 3 | 2) + varint(len(shape)) + shape
    claim += varint(5 << 3) + varint(2**62)
    (tmp_path / "x.index").write_bytes(table([block({b"": HEADER, b"a": claim})]))
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"1234")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="a shape is too large"):
        Bundle(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"

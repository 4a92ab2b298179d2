"""TensorFlow's bundles: equal to the last bit, and safe on any bytes."""

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
from apl_lightning.checkpoints.bundle import Bundle, is_bundle
from apl_lightning.checkpoints.crc32c import crc32c
from apl_lightning.checkpoints.leveldb import read_table

TINY = GOLDEN / "tiny_sifa_bundle"


def test_tensorflows_own_file_bit_for_bit() -> None:
    bundle = Bundle(TINY)
    with np.load(GOLDEN / "tiny_sifa_bundle_expected.npz") as expected:
        assert set(bundle.entries) == set(expected.files)
        for name in expected.files:
            ours = bundle.read(name)
            assert (ours.dtype, ours.shape) == (expected[name].dtype, expected[name].shape)
            assert ours.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("name", ["", "sifa-299", "sifa-299.index", "sifa-299.data-00000-of-00001", "sifa-299.meta"])
def test_all_names_of_a_bundle(name: str) -> None:
    assert is_bundle(TINY / name)
    assert len(Bundle(TINY / name).entries) == 57


@pytest.mark.parametrize("length", [0, 1, 9, 1000, 131_071, 131_072, 140_001])
def test_checksum_is_the_bitwise_one(length: int) -> None:
    data, crc = random.Random(length).randbytes(length), 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 0xFFFFFFFF


def test_checksums_of_the_standard() -> None:
    known = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    for data, crc in known.items():  # RFC 3720, B.4
        assert crc32c(data) == crc


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "bundle")
    return tmp_path / "bundle" / "sifa-299"


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def test_damage_is_named(tiny: Path) -> None:
    name, shard = "Model/e_B/c1/Conv/weights", tiny.with_suffix(".data-00000-of-00001")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"data-00000-of-00001 is too short for 'Model/e_B/c1/Conv/weights'"):
        Bundle(tiny).read(name)
    shutil.copy(TINY / shard.name, shard)
    change(shard, lambda data: data.__setitem__(5, data[5] ^ 1))
    with pytest.raises(CheckpointError, match="the checksum of 'Model/e_B/c1/Conv/weights' is wrong. Copy it again"):
        Bundle(tiny).read(name)
    shard.unlink()
    with pytest.raises(CheckpointError, match="data-00000-of-00001 beside the index, but it is missing"):
        Bundle(tiny).read(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (bytes(100), "does not end as an index"),
        (table([block({b"": HEADER})]).replace(HEADER, HEADER[::-1]), "the checksum of a block is wrong"),
        (table([block({b"": HEADER})])[20:], "outside of the file|checksum"),
        (table([block({b"": HEADER})], named=2), "its blocks overlap"),
        (table([block({b"": varint(2 << 3) + varint(1)})]), "big-endian"),
        (table([block({b"": b""})]), "names no data files"),
        (table([block({b"": HEADER, b"\xff": b""})]), "a name is no text"),
        (table([block({b"": HEADER, b"a": varint(2 << 3) + varint(1)})]), "of another kind"),
        (table([block({b"": HEADER, b"a": b"\x80"})]), "an integer does not end"),
        (table([block({b"": HEADER, b"a": b"\x13"})]), "unknown kind 3"),
        (table([block({b"": HEADER, b"a": b"\x12\x7f"})]), "outside of its message"),
        (table([block({b"": HEADER, b"k" * 2000: b""})]), "outside of its block"),
        (table([b"\0"]), "a block is too short"),
        (table([struct.pack("<I", 1000)]), "a block is too short"),
        (table([block({f"{i:06d}".encode(): b"" for i in range(100_001)})]), "more than 100000 entries"),
    ],
    ids=range(16),
)
def test_bad_index_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.index").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.index is damaged: .*({message})"):
        Bundle(tmp_path / "x")


def test_unreadable_kinds_are_named_when_asked_for(tmp_path: Path) -> None:
    text = varint(1 << 3) + varint(7)
    sliced = entry(np.zeros(2, np.float32), 0, bytes(8)) + varint(7 << 3 | 2) + varint(0)
    index = table([block({b"": HEADER, b"text": text, b"sliced": sliced})])
    (tmp_path / "x.index").write_bytes(index)
    bundle = Bundle(tmp_path / "x")
    with pytest.raises(CheckpointError, match="'text' in .* has type number 7"):
        bundle.read("text")
    with pytest.raises(CheckpointError, match="'sliced' in .* is partitioned"):
        bundle.read("sliced")


def test_written_bundle_comes_back(tmp_path: Path) -> None:
    arrays = {
        "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a/c": np.array(7, np.int64),
        "z": np.zeros((0, 4), np.float64),
    }
    bundle = Bundle(write_bundle(tmp_path / "model-1", arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(bundle.read(name), array)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat or insert some bytes."""
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


@pytest.mark.parametrize("repaired", [False, True], ids=["as it is", "with right checksums"])
def test_fuzzed_bundles_end_in_one_error(tiny: Path, repaired: bool) -> None:
    """Two thousand damaged files: read, or refused; nothing else, in bounded memory."""
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


def test_huge_claims_allocate_nothing(tmp_path: Path) -> None:
    dimension = varint(1 << 3) + varint(2**39)
    shape = b"".join(varint(2 << 3 | 2) + varint(len(dimension)) + dimension for _ in range(8))
    claim = varint(1 << 3) + varint(1) + varint(2 << 3 | 2) + varint(len(shape)) + shape
    claim += varint(5 << 3) + varint(2**62)
    (tmp_path / "x.index").write_bytes(table([block({b"": HEADER, b"a": claim})]))
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"1234")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="is too short for 'a'"):
        Bundle(tmp_path / "x").read("a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"

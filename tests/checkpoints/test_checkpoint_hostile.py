"""Files with impossible shapes, endless dictionaries or bombs are refused with an explanation, in bounded time."""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import HEADER, block, entry, table, varint, write_bundle
from torch import Tensor

from apl_lightning.checkpoints import CheckpointError, ResnetGenerator, identify, load
from apl_lightning.checkpoints.match import matches
from apl_lightning.checkpoints.systems import SYSTEMS

HEADS = {network.head for networks in SYSTEMS.values() for network in networks}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(ResnetGenerator(1, 5, width=8).state_dict())


def saved(folder: Path, content: object) -> Path:
    path = folder / "net.pth"
    torch.save(content, path)
    return path


def refused(path: Path, message: str, *systems: str) -> None:
    """`load` explains what is wrong, and `identify` does so or describes what the file contains."""
    for system in systems or ("synseg",):
        with pytest.raises(CheckpointError, match=message):
            load(system, path)
    with contextlib.suppress(CheckpointError):
        assert "load(" not in identify(path)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model.1.weight": torch.ones(4), "model.23.weight": torch.ones(3, 4)},
            r"with the kernel .*contains model.23.weight of shape \(3, 4\): run",
        ),
        (
            {"model.1.weight": torch.ones(4), "model.23.weight": torch.ones(3, 4, 7, 7)},
            r"of a different shape: model.1.weight \(4,\) instead of \(64, 1, 7, 7\)",
        ),
        ({"model.26.weight": torch.ones(2**60, 0)}, r"contains model.26.weight of shape \(1152921504606846976, 0\)"),
        ({"model.26.weight": torch.ones(2**40, 0, 7, 7)}, r"contains model.26.weight of shape"),
    ],
)
def test_impossible_shapes(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    refused(saved(tmp_path, tensors), message)


@pytest.mark.parametrize("shape", [(), (5,), (5, 0, 1, 1), (2**17, 1, 1, 1)], ids=str)
def test_heads_that_are_no_kernels(shape: tuple[int, ...], tmp_path: Path) -> None:
    refused(saved(tmp_path, {name: torch.ones(shape) for name in HEADS}), "contains .* of shape", *SYSTEMS)


def test_first_kernels_that_are_no_kernels(tmp_path: Path) -> None:
    heads = {head: torch.ones(3, 1, 1, 1) for head in HEADS}
    wrong = {name: torch.ones(3) for name in ("enc.model.0.layer.0.weight", "c1.conv.weight", "model.1.weight")}
    path = saved(tmp_path, {**heads, **wrong})
    refused(path, "keys that are", "sifa-v1", "sifa-pytorch", "synseg", "cyclegan")
    with pytest.raises(CheckpointError, match="keys that are"):
        load("sifa-v2", path, part="generator")


@pytest.mark.parametrize("name", ["gen.training.weight", "gen..weight", "gen.forward", "dec"])
def test_names_that_no_module_has(name: str, tmp_path: Path) -> None:
    tensors = {"seg.model.0.layer.0.weight": torch.ones(5, 512, 1, 1), "gen.a": torch.ones(1), "gen.a.b": torch.ones(1)}
    refused(saved(tmp_path, {**tensors, name: torch.ones(1)}), "keys that are", "sifa-pytorch")


def test_many_networks_in_one_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Only the largest networks are compared: 300 comparisons would take more than a minute."""
    heads = {f"{i}.{head}": torch.ones(3, 1, 1, 1) for i in range(300) for head in HEADS}
    assert 0 < len(matches(heads)) <= 8 * sum(map(len, SYSTEMS.values()))
    networks = {f"net{i}": state for i in range(12)}
    path = saved(tmp_path, {"small": {"model.26.weight": torch.ones(5, 8, 7, 7)}, **networks})
    with pytest.raises(CheckpointError, match=r"pass prefix='net0\.' or prefix='net1\.'"):
        load("synseg", path)
    for prefix in ("net0.", "net11."):
        assert list(load("synseg", path, prefix=prefix).state_dict()) == list(state)


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to_sparse(), r"model.4.weight in .* has the layout torch.sparse_coo"),
        (lambda t: t.flatten(1).to_sparse_csr(), "has the layout torch.sparse_csr"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantized"),
        (lambda t: t.to("meta"), "is on the meta device, which has no values"),
        (lambda t: torch.nested.nested_tensor([t[0], t[0, :1]]), "has the layout nested"),
        (lambda t: t.to(torch.int8), "keys that are not floating-point: model.4.weight torch.int8"),
        (lambda t: t.to(torch.complex64), "not floating-point: model.4.weight torch.complex64"),
    ],
    ids="coo csr quantized meta nested int8 complex".split(),  # noqa: SIM905
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
def test_unusual_tensors(
    state: dict[str, Tensor], change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, {**state, "model.4.weight": change(state["model.4.weight"])})
    refused(path, message)


def test_large_floats_become_infinite(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path, {**state, "model.4.weight": state["model.4.weight"].double() * 1e300})
    with pytest.raises(CheckpointError, match="NaN or infinity in model.4.weight"):
        load("synseg", path)


def test_small_floats_are_converted(state: dict[str, Tensor], tmp_path: Path) -> None:
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    loaded = load("synseg", saved(tmp_path, small)).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in small.items())


def test_expanded_tensors(state: dict[str, Tensor], tmp_path: Path) -> None:
    """16 kB on disk would take 2 GB of memory."""
    expanded = torch.ones(1, 1, 1, 1).expand(5, 2**16, 40, 40)
    path = saved(tmp_path, {"model.26.weight": expanded})
    assert path.stat().st_size < 20_000
    refused(path, r"fit into their file, but model.26.weight of shape \(5, 65536, 40, 40\) .* repeats its values")
    shared = saved(tmp_path, {"model": state, "ema": state, "best": state})
    assert load("synseg", shared, prefix="best.")


# --- dictionaries -----------------------------------------------------------------------------------------------------


def test_dictionary_in_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"weight": torch.ones(1)}
    content["self"] = content
    refused(saved(tmp_path, content), "nested too deeply or contain themselves: save the state dict alone")


def test_shared_dictionaries(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    for _ in range(25):
        content = dict.fromkeys("abcdefgh", content)
    refused(saved(tmp_path, content), "are too large, nested too deeply")


@pytest.mark.parametrize("key", [b"a", b""])
def test_deep_dictionaries(key: bytes, tmp_path: Path) -> None:
    depth, path = 3_000, tmp_path / "net.pth"
    opened, closed = b"}U" + bytes([len(key)]) + key, b"s"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02" + opened * depth + b"}" + closed * depth + b".")
        archive.writestr("net/version", b"3\n")
    refused(path, "nested too deeply" if key else "contains a dict without tensors")


def test_long_and_unusual_keys(tmp_path: Path) -> None:
    refused(saved(tmp_path, {"a" * 1_001: torch.ones(1)}), "dictionaries .* are too large")
    refused(saved(tmp_path, {(1, 2): torch.ones(1)}), "without tensors")
    refused(saved(tmp_path, {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}), "contains a.b twice")


# --- archives ---------------------------------------------------------------------------------------------------------


def test_compressed_archive(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model.26.weight": torch.zeros(2**22)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 100_000
    refused(path, "archive without compression, .* larger than the file: load it with torch and save it again")


# --- TensorFlow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["Model", "Model/g_A", "Model/g_A/r1", "Model/g_A/r1/c1", "Model/e_B/c1", "Model/e_B/r1/c1", "Model/s_B", "", "/"],
)
def test_short_names_of_variables(name: str, tmp_path: Path) -> None:
    arrays = {f"{name}/x": np.zeros(1, np.float32), "other": np.zeros(1, np.float32)}
    arrays |= {name: np.zeros(1, np.float32)} if name else {}
    refused(write_bundle(tmp_path / "sifa-1", arrays), "Expected variables of SIFA", "sifa-v1", "sifa-v2")


def test_empty_variables_with_huge_shapes(tmp_path: Path) -> None:
    sizes = b"".join(
        varint(2 << 3 | 2) + varint(len(size)) + size
        for size in (varint(1 << 3) + varint(n) for n in (0, 2**39, 2**39))
    )
    claim = varint(1 << 3) + varint(1) + varint(2 << 3 | 2) + varint(len(sizes)) + sizes
    claim += varint(6 << 3 | 5) + struct.pack("<I", 0xA282EAD8)
    index = table([block({b"": HEADER, b"Model/e_B/c1/Conv/weights": claim})])
    (tmp_path / "x.index").write_bytes(index)
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"")
    refused(tmp_path / "x", r"is damaged \(a shape is too large\)", "sifa-v2")


def test_variables_that_share_their_bytes(tmp_path: Path) -> None:
    data = bytes(4 * 2**16)
    claim = entry(np.zeros(2**16, np.float32), 0, data)
    names = [f"Model/g_A/r{i}/c1/Conv/weights".encode() for i in range(1, 100)]
    (tmp_path / "x.index").write_bytes(table([block({b"": HEADER, **dict.fromkeys(names, claim)})]))
    (tmp_path / "x.data-00000-of-00001").write_bytes(data)
    refused(tmp_path / "x", "two tensors overlap", "sifa-v2")

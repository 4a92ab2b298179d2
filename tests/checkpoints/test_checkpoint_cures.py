"""Each error names what is in the file, and its cure works; so does each call of `load` that `identify` prints."""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from checkpoint_files import Golden, block, table, write_bundle, write_sifa
from safetensors.torch import save_file
from torch import Tensor, nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.checkpoints import SIFA, CheckpointError, ResnetGenerator, Translated, identify, load
from apl_lightning.checkpoints.__main__ import main


def segmenter() -> ResnetGenerator:
    return ResnetGenerator(1, 5, width=8)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(segmenter().state_dict())


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def same(network: nn.Module, expected: dict[str, Tensor]) -> bool:
    state = network.state_dict()
    return set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in expected)


# --- the calls in the output of `identify` ----------------------------------------------------------------------------


def printed_calls(path: Path) -> list[nn.Module]:
    calls = re.findall(r"^  (load\(.*\))$", identify(path), re.MULTILINE)
    assert calls
    return [eval(call, {"load": load}) for call in calls]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "ema": state},
        lambda state: {"net": state, "G_A": ResnetGenerator(1, 1, 8).state_dict()},
        lambda state: {"A": ResnetGenerator(3, 3, 8).state_dict(), "B": ResnetGenerator(3, 3, 8).state_dict()},
    ],
    ids="one several segmenter-and-generator two-translators".split(),  # noqa: SIM905
)
def test_printed_calls(state: dict[str, Tensor], wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    assert all(
        isinstance(network, ResnetGenerator) for network in printed_calls(saved(tmp_path / "net.pth", wrap(state)))
    )


def test_printed_calls_for_a_bundle(tmp_path: Path) -> None:
    networks = printed_calls(write_sifa(tmp_path, Golden("sifa_v2")))
    assert [type(network).__name__ for network in networks] == ["SIFA", "SIFAGenerator"]


# --- prefixes ---------------------------------------------------------------------------------------------------------


def test_wrong_prefix_lists_the_right_ones(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pth", {"model": state, "ema": {**state, "model.1.bias": torch.ones(3)}})
    for prefix in ("nothing.", "model", ""):
        with pytest.raises(CheckpointError, match=rf"at prefix='{prefix}' in .*net.pth: pass prefix='model\.'\.$"):
            load("synseg", path, prefix=prefix)
    with pytest.raises(CheckpointError, match=r"of a different shape: model.1.bias \(3,\) instead of \(8,\)"):
        load("synseg", path, prefix="ema.")


def test_other_kind_of_network_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "latest_net_G_A.pth", {"a": ResnetGenerator(1, 1, 8).state_dict()})
    with pytest.raises(
        CheckpointError, match=r"segmenter of 'synseg', .* contains a ResNet generator, 9 blocks with 1 "
    ):
        load("synseg", path)
    with pytest.raises(CheckpointError, match=rf"load it with load\('cyclegan', '{path}'\)\.$"):
        load("sifa-v2", path, part="generator")
    path = saved(tmp_path / "latest_net_Seg_A.pth", {"a": state, "b": state})
    call = re.escape(f"load('synseg', '{path}', num_classes=5, prefix='a.')")
    with pytest.raises(CheckpointError, match=f"contains a ResNet generator as segmenter.* load it with {call}"):
        load("cyclegan", path)
    # A fault of the requested network matters more than another network beside it.
    generator = ResnetGenerator(1, 1, 8).state_dict()
    path = saved(tmp_path / "both.pth", {"seg": {**state, "model.1.bias": torch.ones(3)}, "gen": generator})
    with pytest.raises(CheckpointError, match="of a different shape: model.1.bias"):
        load("synseg", path)


# --- the checkpoint of an APLModule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_checkpoint_of_lightning(ema_decay: float | None, tmp_path: Path, trainer: Callable[..., pl.Trainer]) -> None:
    module = APLModule(segmenter(), num_classes=5, ema_decay=ema_decay, learning_rate=1e-2)
    data = TargetDataModule(train=list(torch.rand(2, 1, 16, 16)), batch_size=1)
    callbacks = [PseudoLabelCallback(guard="off"), pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)]
    trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=True).fit(module, data)
    refined = module.export().state_dict()
    path = tmp_path / "last.ckpt"
    assert same(load("synseg", path), refined)
    (network,) = printed_calls(path)
    assert same(network, refined)
    student = load("synseg", path, prefix="state_dict.model.network.")
    assert same(student, refined) == (ema_decay is None)


def refined_module(network: nn.Module) -> APLModule:
    """A module whose teacher differs from its student."""
    module = APLModule(network, num_classes=5)
    with torch.no_grad():
        for parameter in module.teacher.parameters():
            parameter.mul_(1.5)
    module.teacher.n_averaged += 1  # as after a step
    return module


def test_checkpoint_with_two_heads_or_a_translator(tmp_path: Path) -> None:
    module = refined_module(SIFA(5, lower=True, width=2))
    path = saved(tmp_path / "sifa.ckpt", {"state_dict": module.state_dict()})
    assert same(load("sifa-v2", path), module.export().state_dict())

    module = refined_module(Translated(ResnetGenerator(1, 1, 8), segmenter()))
    path = saved(tmp_path / "translated.ckpt", {"state_dict": module.state_dict()})
    refined = module.export()
    assert same(load("synseg", path), refined.segmenter.state_dict())
    assert same(load("cyclegan", path), refined.generator.state_dict())


# --- Python objects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"best": np.array([0.7])}, r"numpy.*"),
        ({"args": argparse.Namespace(lr=0.1)}, r"argparse\.Namespace"),
        ({"network": segmenter()}, r"apl_lightning\.checkpoints\.networks\.resnet_generator\.ResnetGenerator.*"),
    ],
    ids=["numpy", "argparse", "module"],
)
def test_python_objects_are_named(
    state: dict[str, Tensor], content: dict[str, Any], name: str, zipped: bool, tmp_path: Path
) -> None:
    path = saved(tmp_path / "net.pth", {"model": state, **content}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=rf"contains Python objects \({name}\), .* if you trust the file, load it"
    ):
        load("synseg", path)
    cured = torch.load(path, weights_only=False)["model"]
    assert same(load("synseg", saved(path, cured)), state)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_numbers_of_numpy(state: dict[str, Tensor], zipped: bool, tmp_path: Path) -> None:
    """Losses that were logged, as in the checkpoints of nnU-Net."""
    content = {"model": state, "losses": [np.float32(0.5), np.float64(0.7), np.int64(3)]}
    path = saved(tmp_path / "net.pth", content, _use_new_zipfile_serialization=zipped)
    assert same(load("synseg", path), state)


def test_allowed_objects(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pth", {"model": state, "args": argparse.Namespace(lr=0.1)})
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert same(load("synseg", path), state)


def test_other_pickle_protocols(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pth", state, pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"\(Unsupported operand 149\).*load it once .* save the state dict"):
        load("synseg", path)


# --- other formats ----------------------------------------------------------------------------------------------------


def torchscript(state: dict[str, Tensor], path: Path) -> None:
    network = segmenter()
    network.load_state_dict(state)
    torch.jit.trace(network.eval(), torch.rand(1, 1, 16, 16)).save(path)


def numpy_archive(state: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{key: value.numpy() for key, value in state.items()})


@pytest.mark.parametrize("write", [torchscript, numpy_archive])
@pytest.mark.filterwarnings("ignore")
def test_printed_conversion(write: Callable[..., None], state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    write(state, path)
    kind = "TorchScript" if write is torchscript else "NumPy"
    with pytest.raises(CheckpointError, match=f"is a {kind} archive: convert it") as caught:
        load("synseg", path)
    call = re.search(r"torch\.save\(.*, 'weights.pth'\)", str(caught.value))
    assert call
    converted = tmp_path / "weights.pth"
    eval(call[0].replace("'weights.pth'", "converted"), {**globals(), "path": path, "converted": converted})
    assert same(load("synseg", converted), state)


def gzipped(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data))


def zipped(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/net.pth", data)


def tarred(path: Path, data: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("net.pth")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.pth", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page: download the file itself"),
        ("net.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "of Git LFS: run `git lfs pull`"),
        (
            "net.pth",
            pickle.dumps({"a": 1}, protocol=4),
            "is a pickle file of protocol 3 or newer: load it .* torch.save",
        ),
        ("sifa-1", table([block({b"": b"\n\0"})]), "old format V1: .*SaverDef.V2"),
        ("sifa-1.data-00000-of-00001", bytes(100), "without its index: copy sifa-1.index beside it"),
        ("sifa-1.meta", bytes(100), "is the graph of a TensorFlow checkpoint without its index: copy sifa-1.index"),
        ("net.pth", gzipped, "is a gzip archive: extract it"),
        ("net.pth", zipped, "is a zip archive of other files: extract it"),
        ("net.pth", tarred, "is a tar archive: extract it"),
        (
            "net.safetensors",
            struct.pack("<Q", 2) + b"{!",
            "intact .safetensors file, but .* is damaged .*copy it again",
        ),
    ],
    ids="html lfs pickle v1 data meta gzip zip tar safetensors".split(),  # noqa: SIM905
)
def test_other_formats_are_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path, b"data")
    for read in (identify, lambda file: load("sifa-v2", file)):
        with pytest.raises(CheckpointError, match=message):
            read(path)


def test_safetensors(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    save_file({f"module.{key}": value for key, value in state.items()}, path, {"format": "pt"})
    assert same(load("synseg", path), state)
    assert f"load('synseg', '{path}', num_classes=5)" in identify(path)
    data = path.read_bytes()
    for size in (5, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="is damaged .*copy it again"):
            load("synseg", path)
    path.write_bytes(data)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="the package safetensors .* is not installed: pip install safetensors"):
        load("synseg", path)


# --- folders and bundles ----------------------------------------------------------------------------------------------


def test_folder_of_a_bundle(tmp_path: Path) -> None:
    golden = Golden("sifa_v2")
    prefix = write_sifa(tmp_path, golden)
    (tmp_path / "checkpoint").unlink()
    assert isinstance(load("sifa-v2", tmp_path), SIFA)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/deleted-1"\n')
    assert isinstance(load("sifa-v2", tmp_path), SIFA)
    (tmp_path / "sifa-99.index").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"contains 2, .*names none of them: pass {tmp_path}/sifa-99 or another"):
        load("sifa-v2", tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "C:\\\\runs\\\\sifa-299"\n')
    assert isinstance(load("sifa-v2", tmp_path), SIFA)
    assert isinstance(load("sifa-v2", prefix), SIFA)


def test_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a folder without an .index file: pass one of its files \(it has none"
    ):
        load("advent", tmp_path)
    saved(tmp_path / "model_80000.pth", {})
    assert main([str(tmp_path)]) == 1
    assert "pass one of its files (model_80000.pth)" in capsys.readouterr().err


def test_foreign_variables_are_listed(tmp_path: Path) -> None:
    names = [f"tower/conv{i}/kernel" for i in range(5)]
    path = write_bundle(tmp_path / "model-1", {name: np.zeros(1, np.float32) for name in names})
    message = "Model/e_B/c1/Conv/weights, but .*contains tower/conv0/kernel, .* and 2 more: SIFA is the only TensorFlow"
    for read in (identify, lambda file: load("sifa-v2", file)):
        with pytest.raises(CheckpointError, match=message):
            read(path)

"""Loading and identifying checkpoints, error messages for unusable files, and preprocessing of raw images."""

from __future__ import annotations

import io
import math
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import Golden, write_bundle, write_sifa
from torch import Tensor, nn

from apl_lightning import add_dual_heads
from apl_lightning.checkpoints import (
    DRN,
    SIFA,
    CheckpointError,
    DeepLabV2,
    FCN8s,
    ResnetGenerator,
    Translated,
    identify,
    load,
)
from apl_lightning.checkpoints.__main__ import main
from apl_lightning.checkpoints.match import matches
from apl_lightning.checkpoints.networks.legacy_resize import legacy_resize

pytestmark = pytest.mark.usefixtures("two_threads")

State = dict[str, Any]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The state dict of a SynSeg-Net segmenter with 8 channels."""
    torch.manual_seed(0)
    return dict(ResnetGenerator(1, 5, width=8).state_dict())


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def legacy(state: State) -> State:
    """Add the running statistics of instance norms, which torch 0.2 and 0.3 saved but did not use."""
    norms = {f"model.{i}.running_mean": torch.ones(8) for i in (2, 5)}
    return {**state, **norms, "model.2.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "optimizer": {"state": {}}},
        lambda state: {
            "state_dict": {f"net.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(5)},
            "pytorch-lightning_version": "2.4.0",
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        },
        legacy,
        lambda state: {key: value.half() for key, value in state.items()},
    ],
    ids="plain module compiled wrapped model-module lightning legacy half".split(),  # noqa: SIM905
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_wrappers_and_prefixes(state: State, tmp_path: Path, wrap: Callable[[State], State], zipped: bool) -> None:
    path = saved(tmp_path / "latest_net_Seg_A.pth", wrap(state), _use_new_zipfile_serialization=zipped)
    network = load("synseg", path)
    assert not network.training
    assert list(network.state_dict()) == list(state)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=1e-3, rtol=1e-3)


def test_architecture_is_detected_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    for network in (ResnetGenerator(3, 4, 8, 6, dropout=True), ResnetGenerator(1, 4, 12, 9)):
        loaded = load("synseg", saved(path, network.state_dict()), num_classes=4)
        assert repr(loaded) == repr(network.eval())
    drn = DRN(3, (1, 1, 3, 4, 6, 3, 1, 1))
    saved(path, {k: v for k, v in drn.state_dict().items() if "num_batches" not in k})  # as torch 0.2 did
    assert repr(load("cycada", path, num_classes=3)) == repr(drn.eval())
    assert load("advent", saved(path, DeepLabV2(3, 4, ("layer6",)).state_dict()), num_classes=3).levels == ("layer6",)
    golden = Golden("cycada_drn26").facts["keys"]
    assert {key: list(value.shape) for key, value in DRN(5, (1, 1, 2, 2, 2, 2, 1, 1)).state_dict().items()} == golden


def test_prefix_selects_one_of_several_networks(state: State, tmp_path: Path) -> None:
    teacher = {key: value + 1 for key, value in state.items()}
    path = saved(tmp_path / "both.pth", {"model": state, "ema": teacher})
    with pytest.raises(CheckpointError, match=r"contains several: pass prefix='model\.' or prefix='ema\.'"):
        load("synseg", path)
    loaded = load("synseg", path, prefix="ema.").state_dict()
    assert all(torch.equal(loaded[key], teacher[key]) for key in state)


def without(state: State, *names: str) -> State:
    return {key: value for key, value in state.items() if key not in names}


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "is empty: copy it again"),
        (b"this is not a checkpoint at all", {}, "is damaged or has another format"),
        (
            lambda s: {"weight": torch.ones(1), "evil": Malicious()},
            {},
            r"contains Python objects \(builtins.print\), .*weights_only=False.*state_dict",
        ),
        (
            lambda s: nn.Linear(2, 2),
            {},
            r"contains Python objects \(torch.nn.modules.linear.Linear\), which can execute code when loaded",
        ),
        (lambda s: {"epoch": 3}, {}, "contains a dict without tensors"),
        (lambda s: s, {"num_classes": 7}, r"Expected 7 classes, but .* has 5 \(model.26.weight\): pass num_classes=5"),
        (
            lambda s: without(s, "model.1.bias"),
            {},
            r"keys of 'synseg' \(.*9 blocks\), but got .* with keys that are missing: model.1.bias\.",
        ),
        (lambda s: {**s, "model.99.weight": torch.ones(1)}, {}, "keys that are unexpected: model.99.weight"),
        (
            lambda s: {**s, "model.4.weight": torch.ones(1)},
            {},
            r"of a different shape: model.4.weight \(1,\) instead of",
        ),
        (
            lambda s: {**s, "model.1.bias": torch.full((8,), math.nan)},
            {},
            "NaN or infinity in model.1.bias: use an earlier checkpoint",
        ),
        (
            lambda s: s,
            {"system": "advent"},
            r"contains a ResNet generator as segmenter, .*: load it with load\('synseg'",
        ),
        (
            lambda s: without(s, "model.26.weight", "model.26.bias"),
            {},
            "with the kernel model.23.weight or model.26.weight, but .* contains model.1.weight, .* and 43 more: run",
        ),
        (
            lambda s: DRN(5, (1, 1, 2, 2, 2, 2, 1, 1), width=2).state_dict(),
            {},
            r"contains a DRN-26 .*: load it with load\('cycada'",
        ),
    ],
)
def test_unusable_files_are_explained(
    state: State, tmp_path: Path, content: Any, options: State, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content) if isinstance(content, bytes) else saved(path, content(state))
    with pytest.raises(CheckpointError, match=message):
        load(**{"system": "synseg", "path": path, **options})
    assert "executed" not in capfd.readouterr().out


def test_truncated_anywhere(state: State, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data, path = buffer.getvalue(), tmp_path / "net.pth"
    for part in np.linspace(1, len(data) - 1, 12).astype(int):
        path.write_bytes(data[:part])
        with pytest.raises(CheckpointError, match="copy it again"):
            load("synseg", path)


def test_flipped_bits_are_detected(state: State, tmp_path: Path) -> None:
    """The zip format has checksums: loading fails unless the bit is in the padding."""
    data, path = saved(tmp_path / "whole.pth", state).read_bytes(), tmp_path / "net.pth"
    chance, refused = random.Random(0), 0
    for _ in range(100):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            loaded = load("synseg", path).state_dict()
        except CheckpointError:
            refused += 1
        else:
            assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert refused > 80


@pytest.mark.parametrize(
    ("system", "options", "error", "message"),
    [
        ("dann", {}, ValueError, r"`system` to be one of \['adaptsegnet', 'advent', .*but got 'dann'"),
        ("advent", {"tanh": False}, TypeError, r"options of 'advent' among \['prefix'\], but got \['tanh'\]"),
        ("sifa-v2", {"part": "decoder"}, ValueError, "`part` to be 'segmenter' or 'generator', but got 'decoder'"),
        ("synseg", {}, FileNotFoundError, "the file .* does not exist"),
    ],
)
def test_wrong_arguments(system: str, options: State, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        load(system, tmp_path / "nothing.pth", **options)


def test_identify(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "net.pth", {"state_dict": {f"module.{k}": v for k, v in legacy(state).items()}})
    assert main([str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{path}: synseg, ResNet generator as segmenter, 9 blocks, 5 classes\n" in said
    assert f"load('synseg', '{path}', num_classes=5)" in said
    assert "keys: 48 found, none missing or unexpected" in said
    assert "prefix: 'state_dict.module.', removed by load" in said
    assert "unused: model.2.running_mean and 2 more" in said

    broken = saved(tmp_path / "broken.pth", {**without(state, "model.1.bias"), "extra": torch.ones(1)})
    text = identify(broken)
    assert "no network of the seven systems" in text
    assert (
        "closest network: synseg, ResNet generator as segmenter, 9 blocks (5 output channels), 47 of its keys found"
        in text
    )
    assert "missing: model.1.bias" in text
    assert "unexpected: extra" in text
    assert "keys: weight" in identify(saved(tmp_path / "other.pth", {"weight": torch.ones(1)}))

    generator = saved(tmp_path / "latest_net_G_B.pth", ResnetGenerator(1, 1, 8).state_dict())
    assert "cyclegan, ResNet generator, 9 blocks, 1 output channel(s)" in identify(generator)
    twins = identify(saved(tmp_path / "model.pth", Golden("advent").state_dict()))
    assert "advent, DeepLabv2 ResNet, two levels" in twins
    assert "adaptsegnet, DeepLabv2 ResNet, two levels" in twins
    assert main([str(tmp_path / "nothing.pth")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_command(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "net.pth", state)
    monkeypatch.setattr(sys, "argv", ["checkpoints", str(path)])
    monkeypatch.delitem(sys.modules, "apl_lightning.checkpoints.__main__")
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module("apl_lightning.checkpoints", run_name="__main__", alter_sys=True)
    assert "synseg" in capsys.readouterr().out


def test_identify_bundle(tmp_path: Path) -> None:
    golden = Golden("sifa_v2")
    text = identify(write_sifa(tmp_path, golden))
    assert "sifa-v2, SIFA-v2 segmenter, 5 classes" in text
    assert "part='generator'" in text
    assert "sifa-v1" not in text
    with pytest.raises(CheckpointError, match=r"contains a SIFA-v2 segmenter .*load\('sifa-v2'"):
        load("sifa-v1", tmp_path)
    arrays = {key: value for key, value in golden.arrays().items() if "r7/c1/Conv" not in key}
    with pytest.raises(CheckpointError, match=r"keys that are missing: enc.model.10.layer.0.weight\."):
        load("sifa-v2", write_bundle(tmp_path / "sifa-1", arrays))


def test_damaged_file_is_not_a_smaller_network(tmp_path: Path) -> None:
    """Widths and numbers of blocks are read from the file only where the whole file agrees."""
    with torch.device("meta"):
        official = DeepLabV2(5, 4)
    shapes = {name: torch.empty(()).expand(tensor.shape) for name, tensor in official.state_dict().items()}
    cut = {name: tensor for name, tensor in shapes.items() if "layer4.2." not in name}
    assert matches(cut, "advent")[0].faults["missing"][0] == "layer4.2.conv1.weight"
    wrong = {**shapes, "conv1.weight": torch.zeros(32, 3, 7, 7)}
    assert matches(wrong, "advent")[0].faults["of a different shape"] == [
        "conv1.weight (32, 3, 7, 7) instead of (64, 3, 7, 7)"
    ]
    small = small_deeplab(4).state_dict()
    stray = {**small, "layer3.99.conv1.weight": torch.zeros(1)}
    assert matches(stray, "advent")[0].faults["unexpected"] == ["layer3.99.conv1.weight"]
    assert load("advent", saved(tmp_path / "small.pth", small)).state_dict().keys() == small.keys()


# --- networks ---------------------------------------------------------------------------------------------------------


def small_deeplab(branches: int, *levels: str) -> DeepLabV2:
    """DeepLabv2 on a narrow ResNet with 1 block in each stage."""
    return DeepLabV2(5, branches, levels or ("layer5", "layer6"), width=4, blocks=(1, 1, 1, 1))


def narrow_fcn8s() -> FCN8s:
    """FCN-8s with 8 channels in all layers except for the inputs of the score layers, which saves most of the time."""
    network = FCN8s(5)
    channels = 3
    for index, layer in enumerate(network.vgg):
        if isinstance(layer, nn.Conv2d):
            width = {14: 256, 21: 512}.get(index, 8)
            network.vgg[index] = nn.Conv2d(channels, width, 3, padding=1)
            channels = width
    network.vgg_head[0], network.vgg_head[3] = nn.Conv2d(8, 8, 7), nn.Conv2d(8, 8, 1)
    network.scores.last = nn.Conv2d(8, 5, 1)
    return network


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7)])
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_legacy_resize_matches_a_loop_over_pixels(size: tuple[int, int], factor: int) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = torch.zeros(2, 3, size[0] * factor, size[1] * factor, dtype=torch.float64)
    for i in range(size[0] * factor):
        for j in range(size[1] * factor):
            top, left = i // factor, j // factor
            bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
            a, b = i / factor - top, j / factor - left
            upper = (1 - b) * x[:, :, top, left] + b * x[:, :, top, right]
            lower = (1 - b) * x[:, :, bottom, left] + b * x[:, :, bottom, right]
            expected[:, :, i, j] = (1 - a) * upper + a * lower
    torch.testing.assert_close(legacy_resize(x, factor), expected)
    assert torch.autograd.gradcheck(lambda z: legacy_resize(z, factor), x[:1, :1].requires_grad_())


@pytest.mark.parametrize(
    ("build", "head", "own"),
    [
        (lambda: small_deeplab(4), "layer6", "layer5"),
        (lambda: small_deeplab(2, "layer5"), "layer5", None),
        (lambda: DRN(5, (1, 1, 2, 2, 2, 2, 1, 1), width=2), "fc", None),
        (narrow_fcn8s, "scores", None),
        (lambda: ResnetGenerator(1, 5, 8), "model.26", None),
        (lambda: SIFA(5, in_channels=3, width=2), "seg.model.0.layer.0", None),
        (lambda: SIFA(5, lower=True, width=2), "seg.model.0.layer.0", "seg_ll.model.0.layer.0"),
        (lambda: Translated(ResnetGenerator(1, 1, 8), ResnetGenerator(1, 5, 8)), "segmenter.model.26", None),
    ],
)
def test_dual_heads(build: Callable[[], nn.Module], head: str, own: str | None) -> None:
    network = build().eval()
    model = add_dual_heads(network, 5)
    assert model.head == head
    second_head = model.second if own is None else model.network.get_submodule(own)
    assert model._second_head.parts(model.network) == [second_head]
    colour = isinstance(network, DeepLabV2 | DRN | FCN8s)
    image = torch.randn(1, 3 if colour else getattr(network, "in_channels", 1), 64, 64)
    with torch.no_grad():
        output = network(image)
        main, aux = model(image)
    if isinstance(output, tuple):
        first = isinstance(network, SIFA)
        expected, second = output if first else output[::-1]
        assert torch.equal(aux, second)
    else:
        expected = output
    torch.testing.assert_close(main, expected, rtol=1e-5, atol=1e-5)
    assert list(model.export().state_dict()) == list(network.state_dict())
    if isinstance(network, FCN8s):
        assert set(network.state_dict()) == set(Golden("cycada_fcn8s").facts["keys"])


def test_frozen_parameters_of_deeplab() -> None:
    advent, adapt = (add_dual_heads(small_deeplab(branches).eval(), 5) for branches in (4, 2))
    frozen = {name for name, p in adapt.named_parameters() if not p.requires_grad} - {
        name for name, p in advent.named_parameters() if not p.requires_grad
    }
    branches = [f"network.layer{level}.conv2d_list.{i}" for level in (5, 6) for i in (2, 3)]
    assert frozen == {f"{branch}.{kind}" for branch in branches for kind in ("weight", "bias")}
    assert all(p.requires_grad for name, p in adapt.export().named_parameters() if "conv2d_list" in name)
    assert not any(p.requires_grad for name, p in adapt.export().named_parameters() if ".bn" in name)


def test_translator_is_frozen_and_rescales_images() -> None:
    generator = ResnetGenerator(1, 1, 8, dropout=True)
    segmenter = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 5, 1))
    image = torch.rand(1, 1, 32, 32)
    model = Translated(generator, segmenter, value_range=(0, 255)).train()
    assert not generator.training
    assert segmenter.training
    with torch.no_grad():
        expected = segmenter((generator(image) + 1) / 2 * 255)
    torch.testing.assert_close(model(image), expected)
    model(image).sum().backward()
    assert all(p.grad is None for p in generator.parameters())
    torch.testing.assert_close(model.preprocess(image), 2 * image - 1)

    drn = DRN(5, (1, 1, 2, 2, 2, 2, 1, 1), width=2).eval()
    with torch.no_grad():
        grey = (generator(image) + 1) / 2
        torch.testing.assert_close(Translated(generator, drn)(image), drn(drn.preprocess(grey)))
    with pytest.raises(ValueError, match="Expected `value_range`, but got None and Sequential has no `preprocess`"):
        Translated(generator, segmenter)
    with pytest.raises(ValueError, match="SIFA normalises all slices of a volume together"):
        Translated(generator, SIFA(5, width=2))


# --- raw images -------------------------------------------------------------------------------------------------------


def test_preprocess_matches_the_official_code() -> None:
    rgb = torch.tensor([[[10]], [[20]], [[30]]], dtype=torch.uint8)
    deeplab = DeepLabV2(5, 4).preprocess(rgb)
    expected = torch.tensor([30 - 104.00698793, 20 - 116.66876762, 10 - 122.67891434])
    torch.testing.assert_close(deeplab.flatten(), expected, rtol=0, atol=1e-4)
    drn = DRN(5, (1,) * 8).preprocess(rgb)
    expected = torch.tensor([(10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(drn.flatten(), expected)
    torch.testing.assert_close(ResnetGenerator(3, 3, 8).preprocess(rgb), rgb / 255 * 2 - 1)
    torch.testing.assert_close(ResnetGenerator(3, 3, 8).preprocess(rgb / 255), rgb / 255 * 2 - 1)
    grey = torch.rand(2, 1, 4, 4)
    assert DRN(5, (1,) * 8).preprocess(grey).shape == (2, 3, 4, 4)

    volume = torch.randn(3, 1, 8, 8) * 500 + 100
    z = (volume - volume.mean()) / volume.std(correction=0)
    torch.testing.assert_close(SIFA(5, bounds=(-1.8, 4.4)).preprocess(volume), (z + 1.8) / 6.2 * 2 - 1)
    tripled = SIFA(5, in_channels=3).preprocess(volume)
    assert tripled.shape == (3, 3, 8, 8)
    torch.testing.assert_close(tripled[:, 2], SIFA(5).preprocess(volume)[:, 0])
    assert SIFA(5).preprocess(torch.zeros(1, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((1, 4, 4)), TypeError, "to be a tensor, but got ndarray"),
        (torch.zeros(4, 4), ValueError, r"shape \(C, H, W\) or \(B, C, H, W\) with 1 or 3 channels, but got \(4, 4\)"),
        (torch.zeros(2, 4, 4), ValueError, "with 1 or 3 channels"),
        (torch.full((1, 4, 4), 200.0), ValueError, r"uint8 or floats in \[0, 1\], but got .* in \[200, 200\]"),
        (torch.full((1, 4, 4), math.nan), ValueError, "got NaN or infinity"),
        (torch.zeros(1, 4, 4, dtype=torch.int16), ValueError, "uint8 or floats"),
        (torch.zeros(3, 4, 4), ValueError, r"1 channel\(s\) or 1, but got shape \(3, 4, 4\): select one"),
    ],
)
def test_bad_images_are_explained(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ResnetGenerator(1, 5, 8).preprocess(image)


def test_bad_sifa_arguments() -> None:
    with pytest.raises(ValueError, match=r"`bounds` to be two increasing z-scores, but got \(3, 1\)"):
        SIFA(5, bounds=(3, 1))
    with pytest.raises(ValueError, match="height and width of `image` to be multiples of 8"):
        SIFA(5)(torch.zeros(1, 1, 60, 64))
    with pytest.raises(ValueError, match=r"1 channel\(s\) or 1, but got shape \(3, 8, 8\): select one"):
        SIFA(5).preprocess(torch.zeros(3, 8, 8))


def test_an_average_beside_the_network_is_refused(tmp_path: Path) -> None:
    """As by `load_weights`: averages are often kept without the statistics of BatchNorm."""
    network = DRN(5, (1, 1, 2, 2, 2, 2, 1, 1), width=2)
    average = {name: value.detach() + 1 for name, value in network.named_parameters()}
    torch.save({"model": network.state_dict(), "ema": average}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"below 'ema\.' too, .* pass prefix='model\.'"):
        load("cycada", tmp_path / "model.pth")
    loaded = load("cycada", tmp_path / "model.pth", prefix="model.")
    assert torch.equal(loaded.state_dict()["fc.weight"], network.state_dict()["fc.weight"])

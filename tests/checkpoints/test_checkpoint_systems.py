"""What single systems save: the port's unused networks, generators with batch norm, U-Nets, and SIFA's generator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import Golden, fill, write_sifa
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning import APLModule
from apl_lightning.checkpoints import CheckpointError, ResnetGenerator, SIFAGenerator, Translated, identify, load


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# --- the PyTorch port of SIFA -----------------------------------------------------------------------------------------


def test_port_keeps_the_networks_that_are_not_refined(tmp_path: Path) -> None:
    """The port builds all seven networks and loads them with `strict=True`."""
    golden = Golden("sifa_pytorch")
    state = golden.state_dict()
    network = load("sifa-pytorch", saved(tmp_path / "model-400.pth", state))
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == golden.facts["keys"]
    module = APLModule(network, num_classes=5, ema_decay=0.9)
    for parameter in module.model.parameters():
        parameter.data.mul_(1.5)
    module.teacher.update_parameters(module.model)
    refined = module.export().state_dict()
    assert set(refined) == set(state)
    unused = [key for key in state if not key.startswith(("enc.", "seg."))]
    assert len(unused) == 106
    assert all(torch.equal(refined[key], state[key]) for key in unused)
    assert all(refined[key].dtype == state[key].dtype for key in state)
    assert not torch.equal(refined["seg.model.0.layer.0.weight"], state["seg.model.0.layer.0.weight"])
    again = load("sifa-pytorch", saved(tmp_path / "refined.pth", refined)).state_dict()
    assert all(torch.equal(again[key], refined[key]) for key in refined)


# --- CycleGAN ---------------------------------------------------------------------------------------------------------


def batch_norm_state(dropout: bool, blocks: int, width: int = 8) -> dict[str, Tensor]:
    """The state dict of `--norm batch`: no biases before a norm, and five tensors in each norm."""
    second = 6 if dropout else 5
    convolutions = {"model.1": (width, 3, 7, 7), "model.4": (16, 8, 3, 3), "model.7": (32, 16, 3, 3)}
    for index in range(10, 10 + blocks):
        convolutions |= {f"model.{index}.conv_block.{i}": (32, 32, 3, 3) for i in (1, second)}
    convolutions |= {f"model.{10 + blocks}": (32, 16, 3, 3), f"model.{13 + blocks}": (16, 8, 3, 3)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in convolutions.items():
        shapes[f"{name}.weight"] = shape
        path, index = name.rsplit(".", 1)
        channels = shape[1] if name in (f"model.{10 + blocks}", f"model.{13 + blocks}") else shape[0]
        kinds = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{path}.{int(index) + 1}.{kind}": (channels,) for kind in kinds}
        shapes[f"{path}.{int(index) + 1}.num_batches_tracked"] = ()
    shapes |= {f"model.{17 + blocks}.weight": (3, 8, 7, 7), f"model.{17 + blocks}.bias": (3,)}
    return {key: torch.from_numpy(fill(key, shape, 1.0)) for key, shape in shapes.items()}


def batch_norm_output(state: dict[str, Tensor], image: Tensor, dropout: bool, blocks: int) -> Tensor:
    """The generator of `--norm batch` in evaluation mode, step by step."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def same(x: Tensor, name: str, pad: int) -> Tensor:
        return F.conv2d(F.pad(x, (pad,) * 4, mode="reflect"), state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = F.relu(norm(same(image, "model.1", 3), "model.2"))
    for i in (4, 7):
        x = F.relu(norm(F.conv2d(x, state[f"model.{i}.weight"], stride=2, padding=1), f"model.{i + 1}"))
    for i in range(10, 10 + blocks):
        block, second = f"model.{i}.conv_block", 6 if dropout else 5
        y = F.relu(norm(same(x, f"{block}.1", 1), f"{block}.2"))
        x = x + norm(same(y, f"{block}.{second}", 1), f"{block}.{second + 1}")
    for i in (10 + blocks, 13 + blocks):
        y = F.conv_transpose2d(x, state[f"model.{i}.weight"], stride=2, padding=1, output_padding=1)
        x = F.relu(norm(y, f"model.{i + 1}"))
    return torch.tanh(same(x, f"model.{17 + blocks}", 3))


@pytest.mark.parametrize(("dropout", "blocks"), [(False, 9), (True, 9), (False, 6)])
def test_generator_with_batch_norm(dropout: bool, blocks: int, tmp_path: Path) -> None:
    state = batch_norm_state(dropout, blocks)
    generator = load("cyclegan", saved(tmp_path / "latest_net_G_B.pth", state))
    assert set(generator.state_dict()) == set(state)
    assert any(isinstance(module, nn.Dropout) for module in generator.modules()) == dropout
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(generator(image), batch_norm_output(state, image, dropout, blocks))


def test_unet_generator_is_named(tmp_path: Path) -> None:
    keys = [f"model.model.{'1.model.' * bool(i)}{'3.model.' * max(i - 1, 0)}{int(i > 0)}.weight" for i in range(8)]
    path = saved(tmp_path / "latest_net_G_B.pth", {key: torch.ones(8, 8, 4, 4) for key in keys})
    message = "contains a U-Net generator of CycleGAN, which is not supported: build it with CycleGAN's own code"
    assert message in identify(path)
    for system in ("cyclegan", "synseg"):
        with pytest.raises(CheckpointError, match=message):
            load(system, path)


# --- SIFA's generator -------------------------------------------------------------------------------------------------


def test_generator_of_sifa_prepares_images(tmp_path: Path) -> None:
    path = write_sifa(tmp_path, Golden("sifa_v2"))
    generator = load("sifa-v2", path, part="generator", bounds=(-1, 3))
    volume = torch.randn(3, 1, 16, 16) * 500 + 100
    z = (volume - volume.mean()) / volume.std(correction=0)
    torch.testing.assert_close(generator.preprocess(volume), (z + 1) / 2 - 1)
    translated = Translated(generator, ResnetGenerator(1, 5, 8), value_range=(-1, 1))
    torch.testing.assert_close(translated.preprocess(volume), generator.preprocess(volume))
    assert translated(translated.preprocess(volume)).shape == (3, 5, 16, 16)
    torch.testing.assert_close(SIFAGenerator(3).preprocess(volume)[:, 2:], (z + 1.8) / 6.2 * 2 - 1)
    with pytest.raises(ValueError, match="`bounds` to be two increasing z-scores"):
        SIFAGenerator(bounds=(3, 1))


def test_translator_without_preprocess_is_explained() -> None:
    translated = Translated(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 5, 1), value_range=(0, 1))
    with pytest.raises(
        TypeError, match="generator with a method `preprocess`, but Conv2d has none: convert raw images"
    ):
        translated.preprocess(torch.rand(1, 8, 8))

"""`load_weights`: the weights of any file in a network of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, TinyNet
from monai.networks.nets import UNet
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.checkpoints import CheckpointError, load_weights


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrapper", ["", "model.", "state_dict.module.", "state_dict.model._orig_mod."])
def test_wrappers_and_prefixes_are_removed(tmp_path: Path, wrapper: str) -> None:
    saved = TinyNet()
    content: Any = {wrapper.removeprefix("state_dict.") + name: value for name, value in saved.state_dict().items()}
    path = save(tmp_path / "source.pt", {"state_dict": content, "epoch": 3} if "state_dict" in wrapper else content)
    loaded = load_weights(TinyNet(), path)
    assert not loaded.training
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_of_a_refinement_it_is_the_teacher(tmp_path: Path) -> None:
    module = APLModule(TinyNet(), CLASSES)
    with torch.no_grad():
        module.model.network.classifier.bias.add_(1)  # the student
    assert module.teacher is not None
    module.teacher.n_averaged += 1  # as after a step
    loaded = load_weights(TinyNet(), save(tmp_path / "run.ckpt", {"state_dict": module.state_dict()}))
    for name, value in module.export().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_network_without_some_of_the_layers_is_refused(tmp_path: Path) -> None:
    """MONAI's InstanceNorm has no parameters, so all of the network's keys are in the file of one with BatchNorm."""
    arguments = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": (4, 8), "strides": (2,)}
    path = save(tmp_path / "source.pt", UNet(**arguments, norm="batch").state_dict())
    with pytest.raises(CheckpointError, match="more tensors, such as .*running_mean|more tensors, such as .*adn.N"):
        load_weights(UNet(**arguments), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": TinyNet().state_dict(), "b": TinyNet().state_dict()}, r"got several: pass one of \['a.', 'b.'\]"),
        (
            TinyNet(classes=7).state_dict(),
            r"shape: classifier.weight \(7, 6, 1, 1\) instead of \(3, 6, 1, 1\), ",
        ),
        ({k: v for k, v in TinyNet().state_dict().items() if "running" not in k}, "missing: encoder.1.running_mean"),
        (list(TinyNet().state_dict().values()), "its 11 are 0, 1, 2, 3 and 7 more"),
        (torch.zeros(3), "contains one tensor: save"),
        ({**TinyNet().state_dict(), "classifier.bias": torch.full((CLASSES,), -torch.inf)}, "NaN or infinity"),
        ({**TinyNet().state_dict(), "encoder.1.running_var": torch.full((8,), -1.0)}, "variances of at least 0"),
        ({"x": torch.zeros(1)}, "its 1 are x"),
        ({**TinyNet().state_dict(), "classifier.bias": torch.full((CLASSES,), torch.nan)}, "finite weights"),
        ({**TinyNet().state_dict(), "classifier.bias": torch.zeros(CLASSES).char()}, "integers in classifier.bias"),
    ],
    ids=[
        "two networks",
        "other classes",
        "no statistics",
        "a list",
        "a tensor",
        "overflow",
        "variance",
        "another network",
        "NaN",
        "quantised",
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path: Path, content: Any, message: str) -> None:
    network = TinyNet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(network, save(tmp_path / "source.pt", content))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_of_two_networks(tmp_path: Path) -> None:
    first, second = TinyNet(), TinyNet()
    path = save(tmp_path / "two.pt", {"a": first.state_dict(), "b": second.state_dict()})
    loaded = load_weights(TinyNet(), path, prefix="b.")
    assert torch.equal(loaded.state_dict()["classifier.weight"], second.classifier.weight)

    with pytest.raises(CheckpointError, match=r"got prefix='b': pass one of \['a.', 'b.'\] as `prefix`"):
        load_weights(TinyNet(), path, prefix="b")


def named(network: nn.Module) -> Any:
    return {name: value.detach() + 1 for name, value in network.named_parameters()}


@pytest.mark.parametrize(
    ("average_of", "place"),
    [
        (named, "ema."),
        (lambda network: {"shadow_params": list(named(network).values()), "decay": 0.99}, "ema.shadow_params."),
        (lambda network: {name.replace(".", ""): value for name, value in named(network).items()}, "ema."),
    ],
    ids=["by name", "list", "other names"],
)
def test_an_average_without_statistics_is_not_passed_over(tmp_path: Path, average_of: Any, place: str) -> None:
    """Its values would be lost for those of the last step, without a word."""
    saved = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    path = save(tmp_path / "source.pt", {"state_dict": saved.state_dict(), "ema": average_of(saved)})
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(CheckpointError, match=f"its parameters below '{place}' too, .* pass prefix='state_dict.', or"):
        load_weights(network, path)
    assert torch.equal(load_weights(network, path, prefix="state_dict.")[0].weight, saved[0].weight)


class WithExtraState(TinyNet):
    """Keeps more than tensors in its state dict."""

    def get_extra_state(self) -> Any:
        return {"version": 2}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 2}


def test_networks_with_other_state_or_compiled(tmp_path: Path, trainer: Any) -> None:
    saved, parted = TinyNet(), TinyNet()
    path = save(tmp_path / "source.pt", saved.state_dict())
    parted.encoder = torch.compile(parted.encoder)  # type: ignore[assignment]
    for network in (torch.compile(TinyNet()), nn.DataParallel(TinyNet()), parted):
        assert torch.equal(load_weights(network, path).classifier.weight, saved.classifier.weight)
    encoder: Any = parted.encoder
    assert torch.equal(encoder._orig_mod[0].weight, saved.encoder[0].weight)
    own = save(tmp_path / "own.pt", parted.state_dict())
    assert torch.equal(load_weights(TinyNet(), own).encoder[0].weight, saved.encoder[0].weight)
    with pytest.warns(UserWarning, match="WithExtraState keeps more than tensors .* _extra_state stays as it is"):
        load_weights(WithExtraState(), save(tmp_path / "extra.pt", WithExtraState().state_dict()))
    module = APLModule(WithExtraState(), CLASSES)
    trainer(callbacks=[PseudoLabelCallback()]).fit(module, TargetDataModule(Images(2), store_dir=tmp_path / "labels"))
    assert module.export().get_extra_state() == {"version": 2}


def test_a_network_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has none"):
        load_weights(nn.ReLU(), save(tmp_path / "source.pt", {"x": torch.zeros(1)}))


def test_an_average_beside_an_old_file_is_found(tmp_path: Path) -> None:
    """Old files lack the counters of BatchNorm, so the network itself is not complete either."""
    saved = TinyNet()
    state = {name: value for name, value in saved.state_dict().items() if not name.endswith("num_batches_tracked")}
    path = save(tmp_path / "source.pt", {"net": state, "smoothed": named(saved)})
    with pytest.raises(CheckpointError, match=r"below 'smoothed.' too, .* pass prefix='net.'"):
        load_weights(TinyNet(), path)
    assert torch.equal(load_weights(TinyNet(), path, prefix="net.").classifier.weight, saved.classifier.weight)


def test_the_state_of_an_optimiser_is_no_network(tmp_path: Path) -> None:
    """Its moments have the shapes of the parameters; beside a flat state dict it is not taken for layers."""
    saved = TinyNet()
    optimizer = torch.optim.SGD(saved.parameters(), momentum=0.9)
    sum(p.sum() for p in saved.parameters()).backward()
    optimizer.step()
    state = {**saved.state_dict(), "optimizer": optimizer.state_dict(), "lr_schedulers": [{"last_epoch": 3}]}
    loaded = load_weights(TinyNet(), save(tmp_path / "flat.pt", state))
    assert torch.equal(loaded.classifier.weight, saved.classifier.weight)

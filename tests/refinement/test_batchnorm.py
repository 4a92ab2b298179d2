"""BatchNorm statistics: re-estimated on target images, frozen, or updated in training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, TinyNet
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, SelfTrainingModule, TargetDataModule
from apl_lightning.checkpoints import ResnetGenerator, Translated
from apl_lightning.refinement.batchnorm import adapt_batch_norm, batch_norms, set_batch_norm_mode


def test_adapted_statistics_are_those_of_the_images() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3)).eval()
    images = torch.rand(12, 1, 8, 8) * 5 + 2
    with torch.no_grad():
        features = network[0](images)
    adapt_batch_norm(network, images.split(4))
    layer = network[1]
    torch.testing.assert_close(layer.running_mean, features.mean((0, 2, 3)))
    batches = torch.stack([part.var((0, 2, 3)) for part in features.split(4)])
    torch.testing.assert_close(layer.running_var, batches.mean(0))
    assert layer.momentum == 0.3
    assert not layer.training


def test_every_image_counts_the_same() -> None:
    layer = nn.BatchNorm2d(1).eval()
    adapt_batch_norm(layer, [torch.zeros(16, 1, 2, 2), torch.full((1, 1, 2, 2), 17.0)])
    torch.testing.assert_close(layer.running_mean, torch.ones(1))


class ActivatedBatchNorm(nn.BatchNorm2d):
    """BatchNorm and activation in one layer, as in timm's networks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_layer_with_its_own_activation_keeps_it() -> None:
    joined = nn.Sequential(ActivatedBatchNorm(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    apart = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    apart[2].load_state_dict(joined[1].state_dict())
    images = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    for network in (joined, apart):
        adapt_batch_norm(network.eval(), images)
    torch.testing.assert_close(joined[2].running_mean, apart[3].running_mean)
    torch.testing.assert_close(joined[2].running_var, apart[3].running_var)


def test_one_value_per_channel_is_an_error_with_a_cure() -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).eval()
    with pytest.raises(ValueError, match=r"got features \(1, 3, 1, 1\): pass larger images"):
        adapt_batch_norm(network, [torch.rand(1, 3, 8, 8)])
    assert network[1].momentum == 0.1


@pytest.mark.parametrize(("mode", "moves"), [("frozen", False), ("adapt", False), ("train", True)])
def test_mode_in_training(mode: str, moves: bool) -> None:
    module = APLModule(TinyNet(), CLASSES, batch_norm=mode)
    layer = module.model.network.encoder[1]
    module.eval()
    module.train()
    assert layer.training == moves
    before = layer.running_mean.clone()
    module.model.routed(torch.rand(2, 1, 8, 8))
    assert torch.equal(layer.running_mean, before) != moves


def test_only_adapt_changes_statistics_before_training() -> None:
    for mode, changes in (("frozen", False), ("adapt", True), ("train", False)):
        module = APLModule(TinyNet(), CLASSES, batch_norm=mode)
        module.prepare_refinement([torch.rand(4, 1, 8, 8) + 3])
        assert bool(module.model.network.encoder[1].running_mean.any()) == changes


def test_sync_batch_norm_is_adapted_too() -> None:
    plain, images = TinyNet(), [torch.rand(4, 1, 8, 8) for _ in range(3)]
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    for network in (plain, synchronised):
        adapt_batch_norm(network, images)
        set_batch_norm_mode(network.train(), "adapt")
    assert not any(layer.training for layer in batch_norms(synchronised))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(synchronised.state_dict()[name], value)


def test_no_choice_without_batch_norm(trainer: Any, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1))
    callback = PseudoLabelCallback()
    trainer(callbacks=[callback]).fit(APLModule(network, CLASSES), TargetDataModule(Images(4), store_dir=tmp_path))
    assert "pseudo/batch_norm_gain" not in callback.statistics


def test_a_translator_keeps_its_dropout_off_and_its_statistics() -> None:
    generator = ResnetGenerator(1, 1, width=4, blocks=1, dropout=True, batch_norm=True)
    module = SelfTrainingModule(Translated(generator, TinyNet(), value_range=(0, 1)), CLASSES)
    module.train()
    assert module.dropout
    inside = module.model.network.get_submodule("generator")
    assert not any(part.training for part in inside.modules())
    assert batch_norms(module.model) == [module.model.network.get_submodule("segmenter.encoder.1")]
    assert any(isinstance(part, nn.BatchNorm2d) for part in inside.modules())


def test_statistics_without_dropout() -> None:
    network, images = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(2)).train(), torch.randn(16, 2, 8, 8)
    adapt_batch_norm(network, [images])
    torch.testing.assert_close(network[1].running_var, images.var((0, 2, 3)))
    assert network[0].training


def test_layers_that_do_not_run_keep_their_statistics() -> None:
    """Such as those of another domain, which are exported too."""
    network = TinyNet()
    network.other = nn.BatchNorm2d(2)
    nn.init.constant_(network.other.running_mean, 5.0)
    adapt_batch_norm(network, [torch.rand(4, 1, 8, 8)])
    assert network.other.running_mean.tolist() == [5.0, 5.0]
    assert network.encoder[1].num_batches_tracked == 1


@pytest.mark.parametrize("mode", ["frozen", "auto", "train"])
def test_running_statistics_of_instance_norm(mode: Any) -> None:
    """They are fixed as those of BatchNorm are; without running statistics there is nothing to fix."""
    network = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.InstanceNorm2d(1)).train()
    set_batch_norm_mode(network, mode)
    assert [layer.training for layer in network] == [mode == "train", True]

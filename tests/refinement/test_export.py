"""The exported network is finite, averaged over steps and in evaluation mode, also after a second fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from torch.utils.data import DataLoader

from apl_lightning import APLModule, PseudoLabelCallback, SelfTrainingModule, TargetDataModule

Make = Callable[..., pl.Trainer]


def fit(module: Any, folder: Path, trainer: Make, *callbacks: pl.Callback, **options: Any) -> Any:
    data = TargetDataModule(Images(6), batch_size=2, store_dir=folder)
    trainer(callbacks=[PseudoLabelCallback(**options), *callbacks], max_epochs=2).fit(module, data)
    return module.export()


@pytest.mark.parametrize("kind", [APLModule, SelfTrainingModule])
def test_exported_network_is_in_evaluation_mode(kind: Any) -> None:
    module = kind(TinyNet().train(), CLASSES)
    assert not any(part.training for part in module.export().modules())
    assert module.training


def test_second_fit_starts_from_the_averaged_network(tmp_path: Path, trainer: Make) -> None:
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.05)
    first = fit(module, tmp_path / "first", trainer).state_dict()
    module.learning_rate = 0.0
    second = fit(module, tmp_path / "second", trainer).state_dict()
    for name, value in first.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(second[name], value), name


def test_weights_loaded_before_a_fit_are_kept(tmp_path: Path, trainer: Make) -> None:
    module, other = APLModule(TinyNet(), CLASSES, learning_rate=0.0), TinyNet()
    module.model.network.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="heads agree on .* If its weights were loaded after the module was made"):
        exported = fit(module, tmp_path, trainer).state_dict()
    assert torch.equal(exported["classifier.weight"], other.classifier.weight)


def test_weights_loaded_without_a_fit_are_validated_and_exported(trainer: Make) -> None:
    expected = APLModule(TinyNet(), CLASSES)
    module = APLModule(TinyNet(), CLASSES)
    module.model.load_state_dict(expected.model.state_dict())
    assert torch.equal(module.export().classifier.weight, expected.export().classifier.weight)
    loader = DataLoader(Images(4, labelled=True))
    scores, of_expected = (trainer().validate(one, loader) for one in (module, expected))
    assert scores == of_expected


class Break(pl.Callback):
    """Makes a weight or a running mean NaN in the last epoch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            for model in (module.model, module.teacher.module):
                model.state_dict()[self.name].view(-1)[0] = torch.nan


BROKEN = pytest.mark.parametrize("name", ["network.encoder.0.weight", "network.encoder.1.running_mean"])


@BROKEN
def test_nan_is_never_exported(tmp_path: Path, trainer: Make, name: str) -> None:
    module = APLModule(TinyNet(), CLASSES)
    with pytest.raises(ValueError, match=f"'{name}' has NaN or infinity: lower the learning rate"):
        fit(module, tmp_path, trainer, Break(name), guard="off")


@BROKEN
def test_guard_restores_after_nan(tmp_path: Path, trainer: Make, name: str) -> None:
    module = APLModule(TinyNet(), CLASSES)
    with pytest.warns(UserWarning, match="the weights or the predictions are not finite. .*the network .* is restored"):
        exported = fit(module, tmp_path, trainer, Break(name))
    assert all(bool(value.isfinite().all()) for value in exported.state_dict().values())


def test_export_of_averaged_heads() -> None:
    module, image = APLModule(TinyNet(), CLASSES).eval(), torch.rand(1, 1, 8, 8)
    main, aux = module(image)
    torch.testing.assert_close(module.export(average=True)(image), (main + aux) / 2)

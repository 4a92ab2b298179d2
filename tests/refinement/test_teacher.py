"""The teacher is the moving average of the student; it predicts, is exported and is saved in checkpoints."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.refinement import Teacher, adapt_batch_norm

Make = Callable[..., pl.Trainer]


class Weights(pl.Callback):
    """Records the weights of the student before the first step and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if not self.states:
            self._record(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self._record(module)

    def _record(self, module: Any) -> None:
        self.states.append({name: value.clone() for name, value in module.model.state_dict().items()})


def fit(
    folder: Path, trainer: Make, callbacks: Any = (), epochs: int = 2, resume: Any = None, **options: Any
) -> APLModule:
    torch.manual_seed(0)
    arguments = {"learning_rate": 0.02, "ema_decay": 0.7, "batch_norm": "adapt", **options.pop("module", {})}
    module = APLModule(TinyNet(), CLASSES, **arguments)
    data = TargetDataModule(Images(6), batch_size=2, store_dir=folder / "labels")
    run = trainer(max_epochs=epochs, callbacks=[PseudoLabelCallback(guard="off"), *callbacks], **options)
    run.fit(module, data, ckpt_path=resume)
    run.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher_is_the_moving_average_over_steps(tmp_path: Path, trainer: Make, accumulate: int) -> None:
    weights = Weights()
    module = fit(tmp_path, trainer, [weights], accumulate_grad_batches=accumulate)
    steps = [weights.states[0]] + [
        after
        for before, after in zip(weights.states, weights.states[1:], strict=False)
        if not torch.equal(before["network.classifier.weight"], after["network.classifier.weight"])
    ]
    assert len(steps) == 1 + (6 if accumulate == 1 else 4)
    expected = steps[0]
    for state in steps[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * state[name].float() for name in state}
    assert module.teacher is not None
    for name, value in module.teacher.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], msg=name)
        else:
            assert torch.equal(value, steps[-1][name]), name


def test_teacher_predicts_and_is_exported(tmp_path: Path, trainer: Make) -> None:
    module = fit(tmp_path, trainer)
    assert module.teacher is not None
    image, refined = torch.rand(1, 1, 16, 16), module.export().eval()
    assert not any(part.training for part in module.train().teacher.modules())
    module.eval()
    torch.testing.assert_close(module(image).main, refined(image))
    assert not torch.allclose(module.model(image).main, refined(image), atol=1e-4)
    assert all(parameter.requires_grad for parameter in refined.parameters())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_teacher_starts_as_the_prepared_student(trainer: Make) -> None:
    module = APLModule(TinyNet(), CLASSES, aux="fresh")
    module.prepare_refinement([torch.rand(4, 1, 16, 16) + 2])
    assert module.teacher is not None
    for name, value in module.teacher.module.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name]), name


def test_resumed_run_continues_with_its_teacher(tmp_path: Path, trainer: Make) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parted").mkdir()
    whole = fit(tmp_path / "whole", trainer, epochs=3)
    fit(tmp_path / "parted", trainer, epochs=1)
    parted = fit(tmp_path / "parted", trainer, epochs=3, resume=tmp_path / "parted" / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parted.state_dict()[name]), name


def test_without_a_teacher_the_student_predicts() -> None:
    module = APLModule(TinyNet(), CLASSES, ema_decay=None).eval()
    image = torch.rand(1, 1, 8, 8)
    assert module.teacher is None
    assert torch.equal(module(image).main, module.model(image).main)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_bad_decay_is_an_error(decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        Teacher(TinyNet(), decay)


def test_integers_are_copied() -> None:
    """Buffers of indices, as in SwinUNETR, must not be averaged."""
    student = TinyNet()
    student.register_buffer("index", torch.arange(1000))
    teacher = Teacher(student, 0.95)
    for _ in range(50):
        teacher.update_parameters(student)
    assert torch.equal(teacher.module.index, torch.arange(1000))


def test_weights_loaded_after_construction_are_refined(tmp_path: Path, trainer: Make) -> None:
    module, weights = APLModule(TinyNet(), CLASSES), TinyNet().state_dict()
    module.model.network.load_state_dict(weights)
    trainer(max_epochs=0).fit(module, TargetDataModule(Images(2), store_dir=tmp_path))
    assert_same(module, weights)


def test_weights_loaded_after_a_fit_are_refined(tmp_path: Path, trainer: Make) -> None:
    """One module for several hospitals: weights that are loaded into it count, and not the teacher before."""
    module = fit(tmp_path, trainer)
    ended, whole = module.export().state_dict(), copy.deepcopy(module.state_dict())
    source = TinyNet().state_dict()
    module.model.network.load_state_dict(source)
    assert_same(module, source)
    trainer(max_epochs=0).fit(module, TargetDataModule(Images(2), store_dir=tmp_path / "next"))
    assert_same(module, source)
    module.load_state_dict(whole)  # has a teacher, which counts
    assert_same(module, ended)
    trainer(max_epochs=0).fit(module, TargetDataModule(Images(2), store_dir=tmp_path / "last"))
    assert_same(module, ended)
    module.load_state_dict(whole)
    module.model.network.load_state_dict(source)
    assert_same(module, source)


def test_statistics_that_are_estimated_after_a_fit_count(tmp_path: Path, trainer: Make) -> None:
    module = fit(tmp_path, trainer)
    adapt_batch_norm(module.model, [7 * image[None] for image in Images(6)])
    assert_same(module, module.model.export().state_dict())


def test_weights_loaded_after_a_fit_that_diverged_are_refined(tmp_path: Path, trainer: Make) -> None:
    module, source = fit(tmp_path, trainer), APLModule(TinyNet(), CLASSES)
    assert module.teacher is not None
    for network in (module.model, module.teacher):
        for parameter in network.parameters():
            parameter.data.fill_(torch.nan)
    module.on_fit_end()
    module.model.load_state_dict(source.model.state_dict())
    assert_same(module, source.export().state_dict())


def assert_same(module: Any, expected: dict[str, Tensor]) -> None:
    exported = module.export().state_dict()
    assert all(torch.equal(value, exported[name]) for name, value in expected.items())


class Masked(TinyNet):
    """A network that adds a mask of attention, with minus infinity, to a part of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    def forward(self, image: Tensor) -> Tensor:
        attention = (torch.ones_like(self.mask) + self.mask).softmax(dim=1)
        logits: Tensor = super().forward(image) * attention[0, 0]
        return logits


@pytest.mark.parametrize("decay", [0.9, None])
def test_masks_with_minus_infinity(tmp_path: Path, trainer: Make, decay: float | None) -> None:
    """They are copied, and no sign of a network that is broken."""
    network = Masked()
    module = APLModule(network, CLASSES, ema_decay=decay)
    data = TargetDataModule(Images(6), batch_size=2, store_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "After the last epoch")
        trainer(max_epochs=2, callbacks=[PseudoLabelCallback()]).fit(module, data)
    refined = module.export()
    assert torch.equal(refined.mask, network.mask)
    assert not torch.equal(refined.encoder[0].weight, network.encoder[0].weight)


def test_layers_in_place_of_synchronised_batch_norm_stay_in_their_mode() -> None:
    """After a fit on several GPUs Lightning puts new ones there, in training mode."""
    module = APLModule(TinyNet(), CLASSES, batch_norm="frozen")
    synchronised = TorchSyncBatchNorm().apply(module)
    module = TorchSyncBatchNorm().revert(synchronised)
    before = copy.deepcopy(module.state_dict())
    module.on_fit_end()
    module(torch.rand(4, 1, 16, 16))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_loaded_after_a_fit_that_failed_are_refined(tmp_path: Path, trainer: Make) -> None:
    class Fails(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("out of memory")

    module = APLModule(TinyNet(), CLASSES, learning_rate=0.02)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(callbacks=[PseudoLabelCallback(), Fails()]).fit(
            module, TargetDataModule(Images(4), batch_size=2, store_dir=tmp_path)
        )
    source = TinyNet().state_dict()
    module.model.network.load_state_dict(source)
    assert_same(module, source)


class Direct(APLModule):
    def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


class Manual(APLModule):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.losses(batch)["loss"])
        optimizer.step()
        self.update_teacher()


def test_steps_that_pass_the_teacher_by_are_refused(tmp_path: Path, trainer: Make) -> None:
    """Labels, validation and the exported network would stay those of the network that came in."""
    torch.manual_seed(0)
    data = TargetDataModule(Images(4), batch_size=2, store_dir=tmp_path)
    with pytest.raises(RuntimeError, match="Expected each step to update the teacher, as `optimizer_step` of Direct"):
        trainer(callbacks=[PseudoLabelCallback(guard="off")]).fit(Direct(TinyNet(), CLASSES), data)
    torch.manual_seed(0)
    module = Manual(TinyNet(), CLASSES)
    trainer(callbacks=[PseudoLabelCallback(guard="off")]).fit(module, data)
    assert module.teacher is not None
    assert module.teacher.n_averaged == 3

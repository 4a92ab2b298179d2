"""The network in a LightningModule is found, or selected by name; otherwise the error lists the candidates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, TinyNet
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from apl_lightning import APLModule, add_dual_heads
from apl_lightning.heads.unwrap import plain_network


class Project(pl.LightningModule):
    """A network, a loss with weights and a metric; `forward` returns probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image).softmax(1)


class WithoutForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()
        self.perceptual = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))


class Student(Project):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net)


class Pieces(pl.LightningModule):
    """A LightningModule that is itself the network."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 6, 3, padding=1)
        self.classifier = nn.Conv2d(6, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.encoder(image).relu())


class TwoNetworks(WithoutForward):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net)


@pytest.mark.parametrize("build", [Project, WithoutForward, Student])
def test_network_is_found(build: Callable[[], pl.LightningModule]) -> None:
    project = build()
    assert plain_network(project, CLASSES) is project.net
    module = APLModule(project, CLASSES)
    assert type(module.export()) is TinyNet
    project.net.load_state_dict(module.export().state_dict())


class OnePart(pl.LightningModule):
    """Holds nothing but its network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()


def test_module_that_prepares_its_images_is_the_network() -> None:
    class Standardising(OnePart):
        def forward(self, image: Tensor) -> Any:
            return self.net((image - 5) / 3)

    project, image = Standardising().eval(), torch.rand(1, 1, 8, 8)
    assert plain_network(project, CLASSES) is project
    assert torch.equal(add_dual_heads(project, CLASSES)(image).main, project(image))


def test_network_that_is_called_by_keyword_is_found() -> None:
    class ByKeyword(OnePart):
        def forward(self, pixels: Tensor) -> Any:
            return self.net(image=pixels)

    project = ByKeyword()
    assert plain_network(project, CLASSES) is project.net


def test_module_that_ends_in_a_softmax_names_the_cure() -> None:
    class Probabilities(OnePart):
        def forward(self, image: Tensor) -> Any:
            return self.net(image - 5).softmax(1)

    with pytest.raises(ValueError, match="found none among 'net': name it as `network`"):
        add_dual_heads(Probabilities(), CLASSES)
    assert type(add_dual_heads(Probabilities(), CLASSES, network="net").export()) is TinyNet


def test_network_with_two_heads_is_refused() -> None:
    for model in (add_dual_heads(TinyNet(), CLASSES), APLModule(TinyNet(), CLASSES)):
        with pytest.raises(TypeError, match=r"has two heads already: pass what `export\(\)` returns"):
            add_dual_heads(model, CLASSES)


def test_module_that_is_a_network(trainer: Any) -> None:
    project = Pieces()
    trainer().strategy.connect(project)
    project.trainer = trainer()
    model = add_dual_heads(project, CLASSES)
    assert model.head == "classifier"
    assert type(model.export()) is Pieces
    assert model.network._trainer is None


def test_network_is_selected_by_name() -> None:
    project = TwoNetworks()
    assert plain_network(project, CLASSES, "teacher") is project.teacher
    assert type(APLModule(project, CLASSES, network="net").export()) is TinyNet


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (TwoNetworks, {}, "one network that returns .* but found 'net' and 'teacher' among .*: name it as `network`"),
        (lambda: pl.LightningModule(), {}, "LightningModule to hold one network .* but found none among none"),
        (Project, {"num_classes": 7}, r"one network that returns \(B, 7, ...\) logits, but found none among 'net'"),
        (Project, {"network": "model"}, "name a part of Project, but got 'model': its parts are 'net', 'loss'"),
    ],
)
def test_missing_network_is_an_error(build: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_dual_heads(build(), **{"num_classes": CLASSES, **options})


def test_frozen_network_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"all its parameters are frozen: call `model.requires_grad_\(True\)`"):
        add_dual_heads(TinyNet().requires_grad_(False), CLASSES)


class ScalesOnDevice(Project):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch / 255


def test_transfer_hooks_that_do_not_run_are_named() -> None:
    with pytest.warns(UserWarning, match="`on_after_batch_transfer` of ScalesOnDevice does not run here"):
        add_dual_heads(ScalesOnDevice(), CLASSES)

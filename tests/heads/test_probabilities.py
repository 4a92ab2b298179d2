"""Probabilities in place of logits are refused, wherever the network makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CLASSES, TinyNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from apl_lightning import add_dual_heads
from apl_lightning.heads.second_head import CopiedHead
from apl_lightning.preflight import preflight


class Transition(nn.Module):
    """The end of a V-Net: two convolutions, and a softmax or nothing."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(6, CLASSES, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.softmax = softmax

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.second(F.relu(self.norm(self.first(features))))
        return logits.softmax(dim=1) if self.softmax else logits


def ends_with(classifier: nn.Module) -> TinyNet:
    network = TinyNet()
    network.classifier = classifier  # type: ignore[assignment]
    return network


@pytest.mark.parametrize(
    ("classifier", "classes"),
    [
        (Transition(softmax=True), 3),
        (nn.Sequential(nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3), nn.Softmax(dim=1)), 3),
        (nn.Sequential(nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3), nn.Sigmoid()), 3),
        (nn.Sequential(nn.Conv2d(6, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()), 2),
    ],
    ids=["V-Net", "softmax", "sigmoids", "one sigmoid"],
)
@pytest.mark.parametrize("head", [None, "classifier"])
def test_activation_within_the_classifier(classifier: nn.Module, classes: int, head: str | None) -> None:
    with pytest.raises(ValueError, match="behind a sigmoid or a softmax: remove it"):
        add_dual_heads(ends_with(classifier), classes, head)


@pytest.mark.parametrize(
    "classifier",
    [
        Transition(softmax=False),
        nn.Sequential(nn.Conv2d(6, 3, 1), nn.ReLU()),
        nn.Sequential(nn.GroupNorm(1, 6), nn.Conv2d(6, 3, 1)),
    ],
    ids=["V-Net", "ReLU", "normalised features"],
)
def test_logits_that_lie_between_0_and_1(classifier: nn.Module) -> None:
    last = [module for module in classifier.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.fill_(0.5)  # type: ignore[union-attr]
    assert add_dual_heads(ends_with(classifier), CLASSES).num_classes == CLASSES


class Two(TinyNet):
    """Logits, and the probabilities of a second classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(6, CLASSES, 1)

    def forward(self, image: Tensor) -> Any:
        features = self.encoder(image)
        return self.classifier(features), self.second(features).softmax(dim=1)


def test_second_output_of_probabilities_is_no_second_head() -> None:
    assert isinstance(add_dual_heads(Two(), CLASSES)._second_head, CopiedHead)
    with pytest.raises(ValueError, match="the second one gives values in .*use aux='perturbed'"):
        add_dual_heads(Two(), CLASSES, aux="own")


@pytest.mark.parametrize("channels", [1, 3])
def test_preflight_takes_no_sigmoid(channels: int) -> None:
    layer = nn.Conv2d(1, channels, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-20, 20, channels + 1)[1:].view(-1, 1, 1, 1))
        layer.bias.copy_(-layer.weight.flatten() / 2)  # type: ignore[union-attr]
    images = [torch.rand(1, 16, 16) for _ in range(8)]
    preflight(layer, images)
    with pytest.raises(ValueError, match="as after a softmax or a sigmoid"):
        preflight(nn.Sequential(layer, nn.Sigmoid()), images)


class Checkpointed(TinyNet):
    """Saves memory as many projects do, with torch's default."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem, self.outputs = nn.Conv2d(1, 1, 1), outputs

    def forward(self, image: Tensor) -> Any:
        features = checkpoint(self.encoder, self.stem(image), use_reentrant=True)
        logits = self.classifier(features)
        return logits if self.outputs == 1 else (logits, logits.softmax(dim=1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("outputs", [1, 2])
def test_reentrant_checkpoints(outputs: int) -> None:
    network = Checkpointed(outputs)
    model = add_dual_heads(network, CLASSES)
    assert model.head == "classifier"
    assert all(parameter.grad is None for parameter in (*model.parameters(), *network.parameters()))

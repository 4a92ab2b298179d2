"""What a network may do around its classifier."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, TinyNet
from torch import Tensor, nn

from apl_lightning import APLModule, HeadNotFoundError, add_dual_heads


class Skips(nn.Module):
    """A classifier that also reads features which its network has left in it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(6, CLASSES, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.one(features) + self.other(self.left)


class LeavesFeatures(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = Skips()

    def forward(self, image: Tensor) -> Tensor:
        self.classifier.left = self.encoder[:3](image)
        return self.classifier(self.encoder[3](self.classifier.left))


def test_features_beside_the_arguments_are_an_error() -> None:
    with pytest.raises(HeadNotFoundError, match="only through its arguments"):
        add_dual_heads(LeavesFeatures(), CLASSES, head="classifier", aux="encoder.2")


class Prior(TinyNet):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1)


def test_a_constant_behind_the_classifier() -> None:
    network, image = Prior().eval(), torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(add_dual_heads(network, CLASSES)(image).main, network(image))


class Tied(TinyNet):
    """The first and the last layer share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 1, 1)
        self.classifier = nn.Conv2d(1, 1, 1)
        self.classifier.weight = self.encoder.weight


def test_weights_that_the_encoder_uses_too_are_an_error() -> None:
    with pytest.raises(HeadNotFoundError, match="to have weights of its own"):
        add_dual_heads(Tied(), 2, head="classifier")


class HasUnused(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(6, 1, 1)


def test_what_no_logit_depends_on_is_never_trained() -> None:
    """DDP would wait for its gradients; `export` gives it back as it came in."""
    given = HasUnused()
    for model in (given, add_dual_heads(given, CLASSES)):
        module = APLModule(model, CLASSES)
        assert not module.model.network.unused.weight.requires_grad
        assert module.model.network.encoder[0].weight.requires_grad
        assert module.export().unused.weight.requires_grad

"""What a network may do around its classifier."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, TinyNet
from torch import Tensor, nn

from apl_lightning import HeadNotFoundError, add_dual_heads


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

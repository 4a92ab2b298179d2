"""What denoisers predict, with numbers computed by hand."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints import ResnetGenerator, Translated
from apl_lightning.denoisers import DPL, UPL, Chebyshev, MRNet, Predictor
from apl_lightning.heads import Logits, add_dual_heads


class Scripted:
    """A predictor whose passes with dropout are given as probabilities of both heads."""

    def __init__(self, *passes: Any, features: Any = None) -> None:
        self.left, self.kept = list(passes), features

    def with_dropout(self, images: Tensor, rate: float) -> Logits:
        main, aux = self.left.pop(0)
        return Logits(*(torch.tensor(p).log().view(1, -1, 1) for p in (main, aux)))

    def features(self, images: Tensor) -> Tensor:
        return self.kept


def test_variance_of_chebyshev() -> None:
    # Merged: (.3, .6, .1) and (.4, .4, .2): label 1 with .6 and .4, though D_m says 0 in both passes.
    passes = ([0.5, 0.4, 0.1], [0.1, 0.8, 0.1]), ([0.5, 0.4, 0.1], [0.3, 0.4, 0.3])
    p_main, p_aux, variance = Chebyshev(passes=2).predict(Scripted(*passes), torch.zeros(1, 1, 1))
    assert p_main.flatten().tolist() == pytest.approx([0.5, 0.4, 0.1])
    assert p_aux.flatten().tolist() == pytest.approx([0.2, 0.6, 0.2])
    assert variance.item() == pytest.approx(torch.tensor([0.6, 0.4]).var().item())


def test_deviation_of_dpl() -> None:
    # p^(1/2) of (.8, .2) is (2/3, 1/3) when renormalised; that of (.5, .5) stays.
    passes = ([0.8, 0.2], [0.8, 0.2]), ([0.5, 0.5], [0.5, 0.5])
    features = torch.zeros(1, 1, 1)
    _, _, deviation, found = DPL(passes=2).predict(Scripted(*passes, features=features), torch.zeros(1, 1, 1))
    assert deviation.item() == pytest.approx(torch.tensor([2 / 3, 1 / 2]).std().item())
    assert found is features


def test_passes_with_dropout_are_not_kept() -> None:
    passes: list[weakref.ref[Tensor]] = []

    class Watched:
        def with_dropout(self, images: Tensor, rate: float) -> Logits:
            assert sum(made() is not None for made in passes) <= 2
            logits = Logits(torch.randn(1, 3, 4), torch.randn(1, 3, 4))
            passes.extend(map(weakref.ref, logits))
            return logits

    Chebyshev(passes=20).predict(Watched(), torch.zeros(1, 1, 4))
    assert len(passes) == 40


def test_prototypes_of_coarse_features() -> None:
    """A cell of 4 x 4 pixels, in whose corner is the only pixel of class 1."""
    p = torch.full((1, 4, 8), 0.2)
    p[0, 0, 0] = 0.9
    p = torch.stack([1 - p, p], dim=1)
    denoiser = DPL()
    denoiser.begin(0, 2, torch.device("cpu"))
    denoiser.observe(p, p, torch.zeros(1, 4, 8), torch.tensor([0.0, 10.0]).view(1, 1, 1, 2))
    denoiser.settle()
    torch.testing.assert_close(denoiser.prototypes, torch.tensor([[160 / 31], [0.0]]))


def test_scales_of_mrnet() -> None:
    seen = []

    class Coarse:
        def logits(self, images: Tensor) -> Logits:
            seen.append(tuple(images.shape[2:]))
            pooled = F.avg_pool2d(images, 2)
            return Logits(torch.cat([pooled, -pooled], 1), torch.cat([3 * pooled, pooled], 1))

    images = torch.rand(1, 1, 160, 112)
    mean, _ = MRNet(flips=()).predict(Coarse(), images)
    assert seen == [(160, 112), (128, 96)]
    expected = []
    for view in (images, F.interpolate(images, (128, 96), mode="bilinear")):
        pooled = F.avg_pool2d(view, 2)
        fused = torch.cat([2.5 * pooled, -0.5 * pooled], 1)
        expected.append(F.interpolate(fused, (160, 112), mode="bilinear").softmax(1))
    torch.testing.assert_close(mean, sum(expected) / 2)


def test_other_outputs_than_those_of_two_heads() -> None:
    """A batch of two images unpacks like two heads."""
    with pytest.raises(
        TypeError, match=r"Conv2d to return the logits of two heads, but got \(2, 3, 8, 8\): pass it to"
    ):
        Predictor(nn.Conv2d(1, 3, 1))(torch.rand(2, 1, 8, 8))


def test_probabilities_of_many_classes_by_an_inferer() -> None:
    class Network(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return 1 * images, 2 * images

    images = torch.randn(1, 20, 40, 3)
    p_main, p_aux = Predictor(Network(), lambda images, network: network(images))(images)
    torch.testing.assert_close(p_main, images.softmax(1))
    torch.testing.assert_close(p_aux, (2 * images).softmax(1))


class TwoLevels(nn.Module):
    """Two classifiers, each on features of its own, the main one called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(1, 64, 1), nn.Conv2d(64, 64, 1)
        self.main, self.other = nn.Conv2d(64, 3, 1), nn.Conv2d(64, 3, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(image)
        return self.main(input=self.high(low)), self.other(low)


@torch.no_grad()
def test_dropout_on_the_features_of_both_heads() -> None:
    model = add_dual_heads(TwoLevels().eval(), 3)
    predictor, image = Predictor(model), torch.rand(1, 1, 8, 8)
    first, second = (predictor.with_dropout(image, 0.5) for _ in range(2))
    assert model.second is None, "the network's own second output"
    assert not torch.equal(first.main, second.main)
    assert not torch.equal(first.aux, second.aux)
    torch.testing.assert_close(predictor.features(image), model.network.high(model.network.low(image)))


@torch.no_grad()
def test_no_dropout_in_a_fixed_translator() -> None:
    class Seen(nn.Conv2d):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image)
            return super().forward(image)

    seen: list[Tensor] = []
    segmenter = nn.Sequential(Seen(1, 64, 1), nn.Conv2d(64, 3, 1))
    network = Translated(ResnetGenerator(1, 1, width=2, dropout=True), segmenter, value_range=(0, 1)).eval()
    predictor, image = Predictor(add_dual_heads(network, 3)), torch.rand(1, 1, 16, 16)
    seen.clear()
    first, second = (predictor.with_dropout(image, 0.5) for _ in range(2))
    assert torch.equal(*seen), "the translations"
    assert not torch.equal(first.main, second.main), "the features of the classifier"


def test_classifier_that_reads_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier = nn.Conv2d(1, 8, 1), nn.Linear(8, 3)

        def forward(self, image: Tensor) -> Tensor:
            scores: Tensor = self.classifier(self.features(image).movedim(1, -1))
            return scores.movedim(-1, 1)

    predictor = Predictor(add_dual_heads(Last(), 3, head="classifier", aux="perturbed"))
    with pytest.raises(ValueError, match=r"Expected classifiers that read features \(B, F, \*S\), but got Linear"):
        predictor.features(torch.rand(1, 1, 8, 8))


@torch.no_grad()
def test_upl_rotates_in_its_plane() -> None:
    class Noted(nn.Module):
        def forward(self, image: Tensor) -> Logits:
            sizes.append(tuple(image.shape[2:]))
            return Logits(torch.cat([image, -image], dim=1), torch.cat([image, -image], dim=1))

    sizes: list[tuple[int, ...]] = []
    image = torch.rand(1, 1, 6, 4, 2)
    mean, _ = UPL(plane=(2, 3)).predict(Predictor(Noted()), image)
    assert sizes == [(6, 4, 2), (4, 6, 2)] * 2
    torch.testing.assert_close(mean, torch.cat([image, -image], dim=1).softmax(1))

"""The losses of the seven adaptation systems in one training step, against the equations with numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from uda_parts import (
    Affine,
    Decoder,
    Encoder,
    FirstLogit,
    Logits,
    Step,
    TwoAnswers,
    TwoLevels,
    constant_batch,
    known_transform,
)


@pytest.fixture(autouse=True)
def _known_transforms(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("adaptsegnet", "cycada", "cyclegan"):
        monkeypatch.setattr(example(module), "random_affine", known_transform)
    monkeypatch.setattr(example("sifa_v1"), "moved", known_transform)


def from_source(logit: float) -> float:
    """The cross-entropy of a logit whose answer should be "source": -log of the sigmoid."""
    return math.log(1 + math.exp(-logit))


def from_target(logit: float) -> float:
    """The cross-entropy of a logit whose answer should be "target": -log(1 - sigmoid)."""
    return math.log(1 + math.exp(logit))


def probability(logit: float) -> float:
    """The probability of the first of three classes; the logits of the other two are 0."""
    return math.exp(logit) / (math.exp(logit) + 2)


def information(p: float) -> float:
    """ADVENT's weighted self-information of one of three classes."""
    return -p * math.log2(p) / math.log2(3)


def slopes(loss: Callable[..., float], *numbers: float) -> list[float]:
    """The derivatives of a loss by each of the numbers, as differences."""
    steps = [[1e-6 * (other == number) for other in range(len(numbers))] for number in range(len(numbers))]
    ahead = [loss(*(n + h for n, h in zip(numbers, step, strict=True))) for step in steps]
    behind = [loss(*(n - h for n, h in zip(numbers, step, strict=True))) for step in steps]
    return [(high - low) / 2e-6 for high, low in zip(ahead, behind, strict=True)]


def gradients(step: Step, optimizer: int, *names: str) -> list[float]:
    """The gradients of the scales of parts of the module at the step of an optimiser."""
    return [step.gradients[optimizer][f"{name}.scale"].item() for name in names]


def test_cross_entropy_of_known_probabilities(example: Any) -> None:
    """A discriminator that answers log 3 calls 3 of 4 "source"."""
    adversarial, logits = example("adversarial"), torch.full((1, 1, 2, 2), math.log(3))
    assert adversarial.cross_entropy_to(logits, adversarial.FROM_SOURCE).item() == pytest.approx(-math.log(3 / 4))
    assert adversarial.cross_entropy_to(logits, adversarial.FROM_TARGET).item() == pytest.approx(-math.log(1 / 4))


def test_maps_of_advent_are_weighted_self_information(example: Any) -> None:
    module = example("advent").AdventModule(TwoLevels(1.0, 1.0), 4, width=2)
    logits = torch.randn(2, 4, 3, 3)
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(module.maps(logits), -p * p.log2() / math.log2(4))


@pytest.mark.parametrize(
    ("system", "name", "seen"),
    [("adaptsegnet", "AdaptSegNetModule", float), ("advent", "AdventModule", information)],
)
def test_losses_of_adaptsegnet_and_advent(example: Any, system: str, name: str, seen: Callable[[float], float]) -> None:
    """The network deceives both discriminators on target images; they see the map of the first class.

    Target images brighter than 1 count as 1, and `preprocess` doubles all images.
    """
    module = getattr(example(system), name)(TwoLevels(aux=-2.0, main=1.5), 3, width=2)
    module.criterion = FirstLogit()
    module.discriminators = nn.ModuleList([Affine(2.0, -0.3), Affine(-3.0, 0.4)])
    step = Step(module, constant_batch(source=0.1, target=1.25))
    s, t = 2 * 0.2, 2 * 1.0

    def main_judge(logit: float) -> float:
        return 2 * seen(probability(logit)) - 0.3

    def aux_judge(logit: float) -> float:
        return -3 * seen(probability(logit)) + 0.4

    def losses(aux: float, main: float) -> tuple[float, float]:
        deception = 0.1 * from_source(main_judge(main * t)) + 0.02 * from_source(aux_judge(aux * t))
        return 2 * main * s + 0.1 * 2 * aux * s, deception

    segmentation, deception = losses(-2, 1.5)
    of_main = (from_source(main_judge(1.5 * s)) + from_target(main_judge(1.5 * t))) / 2
    of_aux = (from_source(aux_judge(-2 * s)) + from_target(aux_judge(-2 * t))) / 2
    assert step.losses == pytest.approx([segmentation + deception, of_main, of_aux], rel=1e-5)
    assert step.logged == pytest.approx({"adapt/segmentation": segmentation, "adapt/deception": deception}, rel=1e-5)
    expected = slopes(lambda *scales: sum(losses(*scales)), -2, 1.5)
    assert gradients(step, 0, "network.aux", "network.main") == pytest.approx(expected, rel=1e-3)
    assert step.moved[1] == {"discriminators"}
    assert step.schedulers == [1, 1]


@pytest.mark.parametrize("system", ["cyclegan", "synseg"])
def test_losses_of_cyclegan_and_synseg(example: Any, system: str) -> None:
    """Both have deception and cycle; CycleGAN has the identity and SynSeg-Net the segmentation.

    G_A is 2 x + 0.5, G_B is x / 4 - 0.25; discriminators are 2 x + 0.1 of target and 3 x of source images. The pools
    return other images than they get.
    """
    generators = Affine(2.0, 0.5), Affine(0.25, -0.25)
    if system == "cyclegan":
        module = example("cyclegan").CycleGANModule(*generators, width=2)
    else:
        module = example("synseg").SynSegModule(*generators, Logits(1.5), width=2)
        module.criterion = FirstLogit()
    module.judges = nn.ModuleDict({"source": Affine(3.0), "target": Affine(2.0, 0.1)})
    module.pools = {
        "source": SimpleNamespace(exchange=lambda fake: fake.detach() + 0.7),
        "target": SimpleNamespace(exchange=lambda fake: fake.detach() + 0.2),
    }
    step = Step(module, constant_batch(source=0.45, target=0.6))
    s, t = 2 * 0.55 - 1, 2 * 0.7 - 1

    def losses(a: float, b: float) -> dict[str, float]:
        fake_t, fake_s = a * s + 0.5, b * t - 0.25
        deception = (2 * fake_t + 0.1 - 1) ** 2 + (3 * fake_s - 1) ** 2
        cycle = 10 * (abs(b * fake_t - 0.25 - s) + abs(a * fake_s + 0.5 - t))
        if system == "synseg":
            return {"adapt/deception": deception, "adapt/cycle": cycle, "adapt/segmentation": 2 * 1.5 * fake_t}
        identity = 5 * (abs(a * t + 0.5 - t) + abs(b * s - 0.25 - s))
        return {"adapt/deception": deception, "adapt/cycle": cycle, "adapt/identity": identity}

    fake_t, fake_s = 2 * s + 0.5, t / 4 - 0.25
    of_target = ((2 * t + 0.1 - 1) ** 2 + (2 * (fake_t + 0.2) + 0.1) ** 2) / 2
    of_source = ((3 * s - 1) ** 2 + (3 * (fake_s + 0.7)) ** 2) / 2
    assert step.losses == pytest.approx([sum(losses(2, 0.25).values()), of_target, of_source], rel=1e-5)
    assert step.logged == pytest.approx(losses(2, 0.25), rel=1e-5)
    expected = slopes(lambda a, b: sum(losses(a, b).values()), 2, 0.25)
    assert gradients(step, 0, "to_target", "to_source") == pytest.approx(expected, rel=1e-3)
    segmenter = {"segmenter"} if system == "synseg" else set()
    assert step.moved == [{"to_target", "to_source"} | segmenter, {"judges"}]
    assert step.schedulers == [1, 1]


@pytest.mark.parametrize(("source", "translated", "target", "right"), [(0.7, 1.0, 0.1, True), (0.2, 0.8, 1.3, False)])
def test_losses_of_cycada(example: Any, source: float, translated: float, target: float, right: bool) -> None:
    """The network sees translated source images, and deceives the discriminator while this one is right.

    The generator adds 1 in [-1, 1], thus 0.5 in [0, 1]; brighter images count as 1. The discriminator is 2 z - 1.
    """
    module = example("cycada").CyCADAModule(Logits(1.5), Affine(1.0, 1.0), 3, width=4)
    module.criterion, module.discriminator = FirstLogit(), Affine(2.0, -1.0)
    step = Step(module, constant_batch(source, target))
    target = min(target, 1)

    def loss(scale: float) -> float:
        adversarial = 0.1 * from_source(2 * scale * 2 * target - 1)
        return 2 * scale * 2 * translated + (adversarial if right else 0)

    discrimination = from_source(2 * 1.5 * 2 * translated - 1) + from_target(2 * 1.5 * 2 * target - 1)
    assert step.losses == pytest.approx([discrimination / 2, loss(1.5)], rel=1e-5)
    assert gradients(step, 1, "network") == pytest.approx(slopes(loss, 1.5), rel=1e-3)
    assert step.moved == [{"discriminator"}, {"network", "discriminator"} if right else {"network"}]
    assert not module.to_target.training
    assert step.schedulers == [1, 1]


@pytest.mark.parametrize(("system", "channels"), [("sifa-v1", 3), ("sifa-v2", 1)])
def test_losses_of_sifa(example: Any, tmp_path: Path, system: str, channels: int) -> None:
    """Losses of images, of labels and of discriminators, and how much of the gradient of each a network gets."""
    adapt = example("adapt")
    module = adapt.build(system, adapt.SIZES["smoke test"], 3, tmp_path)
    segmenter = nn.Module()
    segmenter.in_channels = module.segmenter.in_channels
    segmenter.enc, segmenter.seg = Encoder(0.3, 0.8, channels), Logits(1.1)
    segmenter.seg_ll = Logits(0.6) if system == "sifa-v2" else None
    module.segmenter, module.generator, module.decoder = segmenter, Affine(0.4, 0.1, channels), Decoder(0.9)
    module.criterion = FirstLogit()
    judges = {"target": Affine(2.0), "source": TwoAnswers(3.0, -1.5), "seg": Affine(1.2), "seg_ll": Affine(-0.7)}
    module.judges = nn.ModuleDict(judges)
    step = Step(module, constant_batch(source=0.1, target=-0.6))

    s, t = 0.2, -0.5

    def losses(g: float, u: float, e_ll: float, e: float, c: float, c_ll: float) -> tuple[float, float, float]:
        def translate(x: float) -> float:
            return g * channels * x + 0.1

        def decode(x: float) -> float:
            return u * e * e_ll * channels * x + 0.5 * x

        fake_t, fake_s = translate(s), decode(t)
        reconstructed, again = decode(fake_t), translate(fake_s)
        images = (2 * fake_t - 1) ** 2 + (3 * fake_s - 1) ** 2 + 10 * (abs(reconstructed - s) + abs(again - t))
        labels = 0.1 * (-1.5 * fake_s - 1) ** 2
        discriminators = (2 * t - 1) ** 2 + (2 * fake_t) ** 2 + (3 * s - 1) ** 2 + (3 * fake_s) ** 2
        discriminators += (-1.5 * reconstructed - 1) ** 2 + (-1.5 * fake_s) ** 2
        # Scale of the logits, of the discriminator, and both weights of each level.
        levels = [(c * e * e_ll, 1.2, 1.0, 0.1), (c_ll * e_ll, -0.7, 0.1, 0.01)]
        for scale, judge, segmentation, adversarial in levels[: 2 if system == "sifa-v2" else 1]:
            of_source, of_target = scale * channels * fake_t, scale * channels * t
            labels += segmentation * 2 * of_source + adversarial * (judge * probability(of_target) - 1) ** 2
            discriminators += (judge * probability(of_source) - 1) ** 2 + (judge * probability(of_target)) ** 2
        return images, labels, discriminators / 2

    numbers = 0.4, 0.9, 0.3, 0.8, 1.1, 0.6
    assert step.losses == pytest.approx(losses(*numbers), rel=1e-5)
    images, labels, _ = losses(*numbers)
    assert step.logged["adapt/deception"] + step.logged["adapt/cycle"] == pytest.approx(images, rel=1e-5)
    assert sum(step.logged.values()) == pytest.approx(images + labels, rel=1e-5)

    names = ["generator", "decoder", "segmenter.enc.lower", "segmenter.enc.upper", "segmenter.seg", "segmenter.seg_ll"]
    names = names if system == "sifa-v2" else names[:-1]
    of_images, of_labels = (slopes(lambda *n, part=part: losses(*n)[part], *numbers) for part in (0, 1))
    shares = [(1, 0), (1, 0), (0.1, 1), (0.1, 1), (0, 1), (0, 1)]
    expected = [a * image + b * label for (a, b), image, label in zip(shares, of_images, of_labels, strict=True)]
    assert gradients(step, 0, *names) == pytest.approx(expected[: len(names)], rel=1e-3)
    assert step.moved == [{"generator", "decoder", "segmenter"}, {"judges"}]

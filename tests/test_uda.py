"""The seven adaptation systems: their losses by hand, and that the loaders read what they save."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import known_run, write_abdomen
from torch import nn

from apl_lightning import checkpoints

SYSTEMS = ("synseg", "adaptsegnet", "cyclegan", "cycada", "advent", "sifa-v1", "sifa-v2")


class Plus(nn.Module):
    """A generator that adds a constant."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(constant))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.constant


class Zero(nn.Module):
    """A discriminator that answers 0 everywhere."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 0 * image[:, :1]


def test_patch_gan_sees_70_pixels(example: Any) -> None:
    field, step = 1, 1
    for layer in example("adversarial").patch_gan(1, 2):
        if isinstance(layer, nn.Conv2d):
            field, step = field + (layer.kernel_size[0] - 1) * step, step * layer.stride[0]
    assert field == 70


def test_image_pool_keeps_images_and_returns_earlier_ones(example: Any) -> None:
    pool = example("adversarial").ImagePool(3)
    first = torch.arange(3.0).view(3, 1, 1, 1).requires_grad_()
    assert torch.equal(pool.exchange(first), first)
    returned = [float(pool.exchange(torch.full((1, 1, 1, 1), float(n)))) for n in range(3, 103)]
    assert any(value < n for n, value in enumerate(returned, start=3)), "earlier images"
    assert any(value == n for n, value in enumerate(returned, start=3)), "new images"
    assert len(returned) == len(set(returned)), "no image is returned twice"
    assert len(pool.images) == 3
    assert not pool.exchange(first).requires_grad


def test_learning_rates(example: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = example("adversarial").linear_after_half(optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5])


def test_losses_of_cyclegan_by_hand(example: Any) -> None:
    """G_A adds 0.5 and G_B subtracts 0.25, so that each way back is off by 0.25; discriminators answer 0."""
    module = example("cyclegan").CycleGANModule(Plus(0.5), Plus(-0.25), width=2)
    module.judges = nn.ModuleDict({"source": Zero(), "target": Zero()})
    source, target = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    losses = module.generator_losses(source, target, source + 0.5, target - 0.25)
    expected = {"deception": 2.0, "cycle": 10 * 0.5, "identity": 5 * 0.75}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)


def test_levels_of_sifa_v2_by_hand(example: Any) -> None:
    """The lower level has a tenth of the weights of the main one; discriminators answer 0."""
    segmenter, generator = checkpoints.SIFA(5, lower=True, width=1), checkpoints.SIFAGenerator(width=2)
    module = example("sifa_v2").SIFAv2Module(segmenter, generator, 5, width=2)
    module.judges.update({"seg": Zero(), "seg_ll": Zero()})
    logits, label = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 8, 8))
    losses = module._segmentation_losses({"seg": (logits, logits), "seg_ll": (logits, logits)}, label)
    assert float(losses["seg_deception"]) == pytest.approx(0.1)
    assert float(losses["seg_ll_deception"]) == pytest.approx(0.01)
    assert float(losses["seg_ll"]) == pytest.approx(0.1 * float(losses["seg"]))
    assert set(example("sifa_v1").SIFAv1Module.levels) == {"seg"}


class NoLoss(nn.Module):
    """A criterion that is 0."""

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return 0 * logits.sum()


class Recorded:
    """Stands in for an optimiser: notes which parameters have a gradient at its step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.moved: list[set[str]] = []

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self) -> None:
        found = {name for name, p in self.module.named_parameters() if p.grad is not None and p.grad.any()}
        self.moved.append({name.split(".")[0] for name in found})


def take_step(module: Any) -> tuple[list[set[str]], dict[str, float]]:
    """Run one training step; return the parts with a gradient, the networks' and the discriminators', and the log."""
    optimizer, logged = Recorded(module), {}
    module.optimizers = lambda: (optimizer, optimizer)
    module.lr_schedulers = list
    module.manual_backward = lambda loss, **options: loss.backward(**options)
    module.log_dict = lambda values, **_: logged.update({name: value.item() for name, value in values.items()})
    images = torch.rand(4, 1, 32, 32)
    label = (images[:2, 0] * 4.99).long()
    module.train().training_step({"source": {"image": images[:2], "label": label}, "target": {"image": images[2:]}})
    return optimizer.moved, logged


def small_deeplab() -> nn.Module:
    return checkpoints.DeepLabV2(5, 4, width=2, blocks=(1, 1, 1, 1)).requires_grad_(True)


def test_step_of_adaptsegnet(example: Any) -> None:
    """A discriminator that answers log 3 calls 3 of 4 "source": the network pays -log(3/4), with the paper's ratio."""
    torch.manual_seed(0)
    module = example("adaptsegnet").AdaptSegNetModule(small_deeplab(), 5, width=2)
    for discriminator in module.discriminators:
        for parameter in discriminator[-1].parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(discriminator[-1].bias, math.log(3))
    moved, logged = take_step(module)
    assert logged["adapt/deception"] == pytest.approx((0.1 + 0.02) * -math.log(3 / 4), rel=1e-4)
    assert "network" in moved[0]
    assert moved[1] == {"discriminators"}


def test_discriminators_learn_the_domains(example: Any) -> None:
    """With fixed networks, the discriminators of AdaptSegNet come to call source predictions "source"."""
    torch.manual_seed(0)
    module = example("adaptsegnet").AdaptSegNetModule(small_deeplab(), 5, width=2)
    discriminator = module.discriminators[0]
    optimizer = torch.optim.Adam(module.discriminators.parameters(), lr=0.02)
    source, target = torch.zeros(2, 5, 32, 32), torch.zeros(2, 5, 32, 32)
    source[:, 0], target[:, 1] = 9.0, 9.0
    module.network.forward = lambda image: (torch.cat([source, target]),) * 2
    step = Recorded(module)
    step.step = lambda: optimizer.step()  # type: ignore[method-assign]
    module.optimizers = lambda: (Recorded(module), step)
    module.lr_schedulers, module.log_dict = list, lambda *_, **__: None
    module.manual_backward = lambda loss: loss.backward() if loss.requires_grad else None
    batch = {"source": {"image": torch.rand(2, 1, 32, 32), "label": torch.zeros(2, 32, 32).long()}}
    for _ in range(20):
        module.training_step({**batch, "target": {"image": torch.rand(2, 1, 32, 32)}})
    assert discriminator(module.maps(source)).mean() > 0 > discriminator(module.maps(target)).mean()


@pytest.mark.parametrize("right", [True, False])
def test_network_of_cycada_moves_while_its_discriminator_is_right(
    example: Any, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    cycada = example("cycada")
    assert cycada.accuracy(torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)) == 1.0
    assert cycada.accuracy(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)) == 0.5
    torch.manual_seed(0)
    module = cycada.CyCADAModule(checkpoints.DRN(5, (1,) * 8, 2), checkpoints.ResnetGenerator(1, 1, 4, 6), 5, width=4)
    module.criterion = NoLoss()  # only the adversarial loss is left
    monkeypatch.setattr(cycada, "accuracy", lambda *_: 0.61 if right else 0.6)
    (discriminator, network), _ = take_step(module)
    assert discriminator == {"discriminator"}
    assert ("network" in network) == right


def test_segmentation_of_sifa_trains_the_segmenter_alone(example: Any) -> None:
    """As in the official code, the generator and the decoder learn from images only."""
    torch.manual_seed(0)
    module = example("sifa_v2").SIFAv2Module(
        checkpoints.SIFA(5, lower=True, width=1), checkpoints.SIFAGenerator(width=2), 5, width=2
    )
    moved, logged = take_step(module)
    assert moved == [{"segmenter", "generator", "decoder"}, {"judges"}]
    assert {f"adapt/{name}" for name in ("deception", "cycle", "seg", "seg_ll", "alignment")} <= set(logged)
    module._image_losses = lambda *images: {"nothing": 0 * sum(image.sum() for image in images)}
    moved, _ = take_step(module)
    assert moved[0] == {"segmenter"}


def test_segmentation_of_synseg_trains_the_generator_too(example: Any) -> None:
    torch.manual_seed(0)
    generators = [checkpoints.ResnetGenerator(1, 1, 4, 6) for _ in range(2)]
    module = example("synseg").SynSegModule(*generators, checkpoints.ResnetGenerator(1, 5, 4, 6, tanh=False), width=2)
    moved, _ = take_step(module)
    assert moved == [{"to_target", "to_source", "segmenter"}, {"judges"}]
    module.generator_losses = lambda *_: {"nothing": torch.zeros(())}
    moved, _ = take_step(module)
    assert moved[0] == {"to_target", "segmenter"}


def test_self_information_of_known_probabilities(example: Any) -> None:
    p = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1)
    expected = torch.tensor([0.5 * math.log(2), 0.25 * math.log(4), 0.25 * math.log(4)]) / math.log(3)
    torch.testing.assert_close(example("advent").self_information(p.log())[0, :, 0], expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_loader_reads_what_a_system_saves(example: Any, tmp_path: Path, system: str) -> None:
    """The command line trains all networks of a system without a target label, and `load` reads the same network."""
    adapt = example("adapt")
    options = ["--data", str(write_abdomen(tmp_path / "data")), "--out", "out", "--size", "32"]
    options += ["--networks", "smoke test"]
    if system == "cycada":
        (tmp_path / "out").mkdir()
        torch.save(checkpoints.ResnetGenerator(1, 1, 4, 6).state_dict(), tmp_path / "out" / adapt.TO_TARGET)
    trained: list[Any] = []

    class Trainer(adapt.pl.Trainer):  # type: ignore[name-defined, misc]
        def fit(self, module: Any, loaders: Any) -> None:
            if isinstance(module, adapt.SourceStart):
                super().fit(module, loaders)
                return
            assert all("label" not in sample for sample in loaders.iterables["target"].dataset)
            before = {name: value.clone() for name, value in module.named_parameters()}
            super().fit(module, loaders)
            changed = {name.split(".")[0] for name, value in module.named_parameters() if not value.equal(before[name])}
            frozen = {"to_target"} if system == "cycada" else set()
            assert changed == {name.split(".")[0] for name in before} - frozen
            trained.append(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt.pl, "Trainer", Trainer)
        adapt.main([system, *options])
    network = adapt.load_adapted(system, tmp_path / "out", 5)
    (module,) = trained
    ours = next(getattr(module, n) for n in ("network", "segmenter", "to_source") if hasattr(module, n)).eval()
    image = network.preprocess(torch.rand(2, 1, 32, 32))
    torch.testing.assert_close(network(image), ours(image), rtol=0, atol=0)


def test_headline(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a system, which needs another one, to the table and the picture; a second call runs nothing again."""
    options = ["--data", str(write_abdomen(tmp_path / "abdomen")), "--out", "out", "--quick", "--jobs", "1"]
    options += ["--chosen", "cycada", "--methods", "APL, paper settings", "--peers", "threshold"]
    text = example("headline").main(options)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/runs/*")}
    assert len(files) == 4 + 2 * 2, "four bases, two refinements with their networks"
    assert text in capsys.readouterr().out
    assert (tmp_path / "out/headline.png").stat().st_size > 1000
    assert example("headline").main(options) == text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/runs/*")} == files


def test_headline_of_known_runs(example: Any) -> None:
    def run(base: str, method: str, before: float, after: float, seed: int = 0) -> dict[str, Any]:
        return {**known_run("abdomen-mr-to-ct", method, seed, before, after), "base": base}

    runs = [
        run("plain", "none", 30, 30),
        run("advent", "none", 60, 60),
        run("advent", "APL, defaults", 60, 66),
        run("sifa-v2", "none", 70, 70),
        run("sifa-v2", "none", 72, 72, seed=1),
        run("sifa-v2", "APL, defaults", 70, 71),
        run("sifa-v2", "APL, defaults", 72, 75, seed=1),
        run("sifa-v2", "CBST", 70, 69),
    ]
    headline = example("headline")
    lines = headline.table(runs).splitlines()
    assert headline.best(runs) == "sifa-v2"
    assert "| source only | 30.0 | 30.0 |  | 2.0 | 58.2 |" in lines
    assert "| ADVENT + APL, defaults | 66.0 | 66.0 | 6.0 | 2.0 | 85.4 (+2.6) |" in lines
    assert "| SIFA-v2 | 71.0 ± 1.4 | 71.0 ± 1.4 |  | 2.0 ± 0.0 | 83.7 |" in lines
    assert "| APL, defaults: mean gain of 2 systems |  |  | +4.0 (+2.0 to +6.0) |  | +3.0 |" in lines
    assert "| SIFA-v2 + CBST | 69.0 | 69.0 | -1.0 | 2.0 | 84.1 (from SIFA-v1) |" in lines
    assert json.dumps(lines).count("SynSeg-Net") == 0, "no row without runs"

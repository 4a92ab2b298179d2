"""The seven adaptation systems: what they share, what learns in a step, and that the loaders read what they save."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_examples import known_run, write_abdomen
from torch import nn
from uda_parts import Step, random_batch

from apl_lightning import checkpoints

SYSTEMS = ("synseg", "adaptsegnet", "cyclegan", "cycada", "advent", "sifa-v1", "sifa-v2")


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


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear_after_half", [1, 1, 1, 0.5, 0]), ("polynomial", [1, 0.75**0.9, 0.5**0.9, 0.25**0.9, 0])],
)
def test_learning_rates(example: Any, schedule: str, expected: list[float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = getattr(example("adversarial"), schedule)(optimizer, 4)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)


def build(example: Any, system: str, folder: Path) -> Any:
    """The module of a system with the smallest networks."""
    adapt = example("adapt")
    if system == "cycada":
        torch.save(checkpoints.ResnetGenerator(1, 1, 4, 6).state_dict(), folder / adapt.TO_TARGET)
    return adapt.build(system, adapt.SIZES["smoke test"], 5, folder)


TRANSLATION = ("to_target", "to_source")
SIFA = ("segmenter", "generator", "decoder")


# Parts of the module, learning rate, betas and weight decay of each optimiser.
@pytest.mark.parametrize(
    ("system", "networks", "discriminators", "left"),
    [
        ("synseg", ((*TRANSLATION, "segmenter"), 5e-4, (0.5, 0.999), 0), (("judges",), 5e-4, (0.5, 0.999), 0), 0.5),
        ("cyclegan", (TRANSLATION, 2e-4, (0.5, 0.999), 0), (("judges",), 2e-4, (0.5, 0.999), 0), 0.5),
        (
            "adaptsegnet",
            (("network",), 5e-4, (0.9, 0.999), 5e-4),
            (("discriminators",), 5e-4, (0.9, 0.99), 0),
            0.25**0.9,
        ),
        ("advent", (("network",), 5e-4, (0.9, 0.999), 5e-4), (("discriminators",), 5e-4, (0.9, 0.99), 0), 0.25**0.9),
        ("cycada", (("network",), 5e-4, (0.9, 0.999), 5e-4), (("discriminator",), 1e-4, (0.5, 0.999), 0), 0.25**0.9),
        ("sifa-v1", (SIFA, 5e-4, (0.5, 0.999), 0), (("judges",), 5e-4, (0.5, 0.999), 0), 1.0),
        ("sifa-v2", (SIFA, 5e-4, (0.5, 0.999), 0), (("judges",), 5e-4, (0.5, 0.999), 0), 1.0),
    ],
)
def test_optimisers(example: Any, tmp_path: Path, system: str, networks: Any, discriminators: Any, left: float) -> None:
    """One optimiser has the networks, the other the discriminators; `left` of the rates is left after 3 of 4 steps."""
    module = build(example, system, tmp_path)
    assert type(module).__module__ == system.replace("-", "_")
    trainer = type("Trainer", (), {"estimated_stepping_batches": 4})()
    module.trainer = trainer
    configured = module.configure_optimizers()
    optimizers, schedulers = configured if isinstance(configured, tuple) else (configured, [])
    for optimizer, (parts, rate, betas, decay) in zip(optimizers, (networks, discriminators), strict=True):
        (group,) = optimizer.param_groups
        expected = {parameter for name, parameter in module.named_parameters() if name.split(".")[0] in parts}
        assert set(group["params"]) == expected
        assert all(parameter.requires_grad for parameter in expected)
        assert (group["lr"], group["betas"], group["weight_decay"]) == (rate, betas, decay)
        optimizer.step()
    for scheduler in 3 * schedulers:
        scheduler.step()
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    assert rates == pytest.approx([left * networks[1], left * discriminators[1]])


@pytest.mark.parametrize(
    ("system", "size"),
    [("synseg", 1), ("cyclegan", 1), ("cycada", 4), ("sifa-v1", 4), ("sifa-v2", 4), ("adaptsegnet", 8), ("advent", 8)],
)
def test_batches(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, size: int) -> None:
    """A segmentation network first learns 8 labelled source images a step; then pairs of batches of `size`.

    SIFA gets images as its networks need them: the generator those of the source, the segmenter those of the target.
    """
    adapt, module = example("adapt"), build(example, system, tmp_path)
    fits, prepared = [], []
    monkeypatch.setattr(adapt, "build", lambda *_: module)
    monkeypatch.setattr(adapt, "prepared", lambda images, network: prepared.append((images, network)) or images)
    trainer = SimpleNamespace(fit=lambda module, loaders: fits.append((module, loaders)))
    source, target = ["source"], ["target"]
    adapt.adapt(system, source, target, adapt.SIZES["smoke test"], tmp_path, lambda: trainer, 5)
    *first, (trained, pairs) = fits
    started = [(load.dataset, load.batch_size, len(load)) for _, load in first]
    assert started == ([] if system == "cyclegan" else [(source, 8, 1)])
    assert trained is module
    found = {name: (load.dataset, load.batch_size, len(load)) for name, load in pairs.iterables.items()}
    assert found == {"source": (source, size, 2), "target": (target, size, 2)}
    sifa = system.startswith("sifa")
    assert prepared == ([(source, module.generator), (target, module.segmenter)] if sifa else [])


class NoLoss(nn.Module):
    """A criterion that is 0."""

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return 0 * logits.sum()


def small_deeplab() -> nn.Module:
    return checkpoints.DeepLabV2(5, 4, width=2, blocks=(1, 1, 1, 1)).requires_grad_(True)


def test_discriminators_learn_the_domains(example: Any) -> None:
    """With fixed networks, the discriminators of AdaptSegNet come to call source predictions "source"."""
    torch.manual_seed(0)
    module = example("adaptsegnet").AdaptSegNetModule(small_deeplab(), 5, width=2)
    discriminator = module.discriminators[0]
    optimizer = torch.optim.Adam(module.discriminators.parameters(), lr=0.02)
    source, target = torch.zeros(2, 5, 32, 32), torch.zeros(2, 5, 32, 32)
    source[:, 0], target[:, 1] = 9.0, 9.0
    module.network.forward = lambda image: (torch.cat([source, target]),) * 2
    idle = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    module.optimizers = lambda: (idle, optimizer)
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
    discriminator, network = Step(module, random_batch()).moved
    assert discriminator == {"discriminator"}
    assert ("network" in network) == right


def test_segmentation_of_sifa_trains_the_segmenter_alone(example: Any) -> None:
    """As in the official code, the generator and the decoder learn from images only."""
    torch.manual_seed(0)
    module = example("sifa_v2").SIFAv2Module(
        checkpoints.SIFA(5, lower=True, width=1), checkpoints.SIFAGenerator(width=2), 5, width=2
    )
    step = Step(module, random_batch())
    assert step.moved == [{"segmenter", "generator", "decoder"}, {"judges"}]
    names = ("deception", "cycle", "seg", "seg_deception", "seg_ll", "seg_ll_deception", "alignment")
    assert set(step.logged) == {f"adapt/{name}" for name in names}
    module._image_losses = lambda *images: {"nothing": 0 * sum(image.sum() for image in images)}
    assert Step(module, random_batch()).moved[0] == {"segmenter"}


def test_segmentation_of_synseg_trains_the_generator_too(example: Any) -> None:
    torch.manual_seed(0)
    generators = [checkpoints.ResnetGenerator(1, 1, 4, 6) for _ in range(2)]
    module = example("synseg").SynSegModule(*generators, checkpoints.ResnetGenerator(1, 5, 4, 6, tanh=False), width=2)
    assert Step(module, random_batch()).moved == [{"to_target", "to_source", "segmenter"}, {"judges"}]
    module.generator_losses = lambda *_: {"nothing": torch.zeros(())}
    assert Step(module, random_batch()).moved[0] == {"to_target", "segmenter"}


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

"""The seven adaptation systems: their losses by hand, and that the loaders read what they save."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import known_run, write_abdomen
from torch import nn

SYSTEMS = ("synseg", "adaptsegnet", "cyclegan", "cycada", "advent", "sifa-v1", "sifa-v2")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Import an example by name; the working directory is a temporary folder."""
    for folder in (EXAMPLES, EXAMPLES / "uda", EXAMPLES / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return importlib.import_module


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
    checkpoints = importlib.import_module("apl_lightning.checkpoints")
    segmenter, generator = checkpoints.SIFA(5, lower=True, width=1), checkpoints.SIFAGenerator(width=2)
    module = example("sifa_v2").SIFAv2Module(segmenter, generator, 5, width=2)
    module.judges.update({"seg": Zero(), "seg_ll": Zero()})
    logits, label = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 8, 8))
    losses = module._segmentation_losses({"seg": (logits, logits), "seg_ll": (logits, logits)}, label)
    assert float(losses["seg_deception"]) == pytest.approx(0.1)
    assert float(losses["seg_ll_deception"]) == pytest.approx(0.01)
    assert float(losses["seg_ll"]) == pytest.approx(0.1 * float(losses["seg"]))
    assert set(example("sifa_v1").SIFAv1Module.levels) == {"seg"}


def test_discriminator_of_cycada_must_be_right(example: Any) -> None:
    right, wrong = torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)
    accuracy = example("cycada").accuracy
    assert accuracy(right, wrong) == 1.0
    assert accuracy(right, right) == 0.5


def test_self_information_of_known_probabilities(example: Any) -> None:
    p = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1)
    expected = torch.tensor([0.5 * math.log(2), 0.25 * math.log(4), 0.25 * math.log(4)]) / math.log(3)
    torch.testing.assert_close(example("advent").self_information(p.log())[0, :, 0], expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_loader_reads_what_a_system_saves(example: Any, tmp_path: Path, system: str) -> None:
    """The command line trains all networks of a system without a target label, and `load` reads the same network."""
    adapt, checkpoints = example("adapt"), importlib.import_module("apl_lightning.checkpoints")
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
    """From a system to the table and the picture; a second call runs nothing again."""
    options = ["--data", str(write_abdomen(tmp_path / "abdomen")), "--out", "out", "--quick", "--jobs", "1"]
    options += ["--chosen", "adaptsegnet", "--methods", "APL, defaults", "--peers", "threshold"]
    text = example("headline").main(options)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/runs/*")}
    assert len(files) == 3 + 2 * 2, "three bases, two refinements with their networks"
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
    assert "| mean gain of 2, APL, defaults |  |  | +4.0 (+2.0 to +6.0) |  | +2.9 |" in lines
    assert "| SIFA-v2 + CBST | 69.0 | 69.0 | -1.0 | 2.0 | 84.1 |" in lines
    assert json.dumps(lines).count("SynSeg-Net") == 0, "no row without runs"

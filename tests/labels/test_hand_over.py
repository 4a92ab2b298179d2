"""What a round hands to its parts: the denoiser, the second head, the guard, the precision, the seeds."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, Slices, TinyNet
from torch import Tensor

from apl_lightning import APLModule, PseudoLabelCallback, SelfTrainingModule, TargetDataModule
from apl_lightning.denoisers import CBST, UPL, Denoiser, MRNet
from apl_lightning.labels import Labelling
from apl_lightning.labels.labelling import CAREFUL_GAIN, GAIN


def test_denoiser_knows_the_round(tmp_path: Path, trainer: Any) -> None:
    denoiser = CBST(portion=0.2, step=0.1)
    data = TargetDataModule(Images(4), store_dir=tmp_path)
    trainer(max_epochs=3, callbacks=[PseudoLabelCallback(denoiser, guard="off")]).fit(
        SelfTrainingModule(TinyNet(), CLASSES), data
    )
    assert denoiser._portion == pytest.approx(0.4)


@pytest.mark.parametrize("aux", ["fresh", "encoder.2"])
def test_new_head_is_warm_before_the_first_round(tmp_path: Path, trainer: Any, aux: Any) -> None:
    module = APLModule(TinyNet(), CLASSES, aux=aux, learning_rate=0.0)
    trainer(callbacks=[PseudoLabelCallback()]).fit(module, TargetDataModule(Images(4), store_dir=tmp_path))
    with torch.no_grad():
        main, second = (z.softmax(1) for z in module.eval()(torch.stack(list(Images(4)))))
    assert module.model.warm
    assert (main - second).abs().mean() < 0.02


def test_order_of_preparation(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new head is fitted to the statistics of BatchNorm that stay."""
    order: list[str] = []

    def noted(name: str) -> Any:
        method = getattr(APLModule, name)
        return lambda self, given: (order.append(name), method(self, given))[1]

    for name in ("prepare_refinement", "choose_batch_norm", "warm_up"):
        monkeypatch.setattr(APLModule, name, noted(name))
    module = APLModule(TinyNet(), CLASSES, aux="fresh")
    trainer(callbacks=[PseudoLabelCallback()]).fit(module, TargetDataModule(Images(4), store_dir=tmp_path))
    assert order == ["prepare_refinement", "choose_batch_norm", "warm_up"]


def test_gains_by_hand() -> None:
    """A class that no network predicts has none; losses count four times in the careful gain."""
    labelling = Labelling.__new__(Labelling)
    labelling._names, labelling.num_classes = ["background", "a", "b", "c"], 4
    labelling.sample = SimpleNamespace(gains=lambda *_: [0.1, -0.2, math.nan])  # type: ignore[assignment]
    expected = {GAIN: -0.05, CAREFUL_GAIN: (0.1 - 4 * 0.2) / 2, f"{GAIN}/a": 0.1, f"{GAIN}/b": -0.2}
    assert labelling.gains({}, {}) == pytest.approx(expected)


def test_guard_knows_the_patients(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices of the two patients alternate; no fold has some of both."""
    seen: list[Tensor] = []

    def opinion(features: Tensor, folds: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        seen.append(folds)
        return torch.zeros(len(folds), num_classes)

    monkeypatch.setattr("apl_lightning.guard.pixel_sample.second_opinion", opinion)
    trainer(callbacks=[PseudoLabelCallback()]).fit(
        APLModule(TinyNet(), CLASSES), TargetDataModule(Slices(6), store_dir=tmp_path)
    )
    first, second = ({*seen[0].view(6, -1)[start::2].flatten().tolist()} for start in (0, 1))
    assert (first, second) == ({0, 1, 2, 3}, {4, 5, 6, 7})


@pytest.mark.parametrize("denoiser", [MRNet(scales=(1.0,)), UPL()])
def test_guard_looks_at_the_main_head_alone(tmp_path: Path, trainer: Any, denoiser: Denoiser) -> None:
    """A network that stays has no gain, though these methods predict in another way."""
    callback = PseudoLabelCallback(denoiser, patience=None)
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.0, batch_norm="frozen")
    trainer(max_epochs=2, callbacks=[callback]).fit(module, TargetDataModule(Images(6), store_dir=tmp_path))
    assert callback.statistics[GAIN] == 0


def test_labels_in_the_precision_of_the_trainer(tmp_path: Path, trainer: Any) -> None:
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.0, batch_norm="frozen")
    images, seen = Images(4), []

    def keep(p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(p_main.clone())
        return p_main.argmax(1), torch.ones_like(p_main[:, 0])

    callback = PseudoLabelCallback(keep, guard="off")
    data = TargetDataModule(images, store_dir=tmp_path)
    trainer(precision="bf16-mixed", callbacks=[callback]).fit(module, data)
    batch = torch.stack(list(images))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = module.eval()(batch).main.float().softmax(1)
    assert torch.equal(torch.cat(seen), expected)
    with torch.no_grad():
        assert not torch.equal(module(batch).main.softmax(1), expected)


def test_each_batch_and_round_has_its_seed() -> None:
    callback, seeds, rounds = PseudoLabelCallback(), set(), set()
    callback.round = 0
    for epoch, batch, rank in product(range(2), repeat=3):
        trainer: Any = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        callback.on_train_batch_start(trainer, None, {"round": [0]}, batch)  # type: ignore[arg-type]
        seeds.add(torch.initial_seed())
    for callback.round in range(3):
        rounds.add(callback._next_seed)
    assert (len(seeds), len(rounds)) == (8, 3)

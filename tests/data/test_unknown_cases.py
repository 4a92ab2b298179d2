"""Samples whose case is `None` or empty do not belong to one common patient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, TinyNet
from torch.utils.data import DataLoader

from apl_lightning import APLModule, CaseDice, PseudoLabelCallback, TargetDataModule
from apl_lightning.data import EvaluationDataset, Keys, split_batch


def samples(case: Any) -> list[dict[str, Any]]:
    return [{"image": image, "label": label, "case": case} for image, label in Images(4, labelled=True)]


@pytest.mark.parametrize("case", [None, ""])
def test_slices_without_a_case_are_not_one_volume(tmp_path: Path, trainer: Any, case: Any) -> None:
    data = TargetDataModule(samples(case), store_dir=tmp_path)
    callback = PseudoLabelCallback(largest_component_share=0.0)
    trainer(callbacks=[callback]).fit(APLModule(TinyNet(), CLASSES), data)
    assert callback.statistics["pseudo/apart"] == 0


@pytest.mark.parametrize("case", [None, ""])
def test_each_sample_without_a_case_is_its_own_case(trainer: Any, case: Any) -> None:
    labelled = samples(case)
    assert [sample["case"] for sample in EvaluationDataset(labelled, Keys(), labelled=True)] == ["0", "1", "2", "3"]
    module = APLModule(TinyNet(), CLASSES)
    dice = CaseDice(CLASSES)
    images, labels = (torch.stack([sample[key] for sample in labelled]) for key in ("image", "label"))
    with torch.no_grad():
        dice.update(module.eval()(images).main.argmax(1), labels)
    (found,) = trainer().validate(module, TargetDataModule(val=labelled), verbose=False)
    assert found["val/dice"] == pytest.approx(dice.compute()[1:].nanmean().item())
    if case == "":
        (found,) = trainer().validate(module, DataLoader(labelled, 4), verbose=False)
        assert found["val/dice"] == pytest.approx(dice.compute()[1:].nanmean().item())


def test_cases_of_a_batch() -> None:
    batch = {"image": torch.rand(3, 1, 2, 2), "case": ["a", "", None]}
    assert split_batch(batch, Keys())[2] == ["a", None, None]
    assert split_batch({"image": torch.rand(1, 1, 2, 2)}, Keys())[2] is None


def test_numbers_of_cases() -> None:
    batch = {"image": torch.rand(2, 1, 2, 2), "case": torch.tensor([1, 2])}
    assert split_batch(batch, Keys())[2] == ["1", "2"]
    assert EvaluationDataset([{"image": batch["image"][0], "case": batch["case"][0]}], Keys(), False)[0]["case"] == "1"

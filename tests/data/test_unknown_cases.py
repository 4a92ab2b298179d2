"""Samples whose case is `None` or empty do not belong to one common patient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, TinyNet
from torch.utils.data import ConcatDataset, DataLoader, Subset

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


def test_two_folders_with_a_patient_of_one_name(tmp_path: Path, trainer: Any) -> None:
    """Slices of two patients make neither a volume nor a case."""
    large, small = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    large[:, :6, :6], small[:, 7:, 7:] = 1, 1
    hospitals = [
        [{"image": image, "label": image[0].long(), "case": "patient_1"} for image in (image, image)]
        for image in (large, small)
    ]
    joined = ConcatDataset(hospitals)
    cases = [sample["case"] for sample in EvaluationDataset(Subset(joined, [0, 3, 2]), Keys(), labelled=True)]
    assert cases == ["0/patient_1", "1/patient_1", "1/patient_1"]

    def by_intensity(p_main: torch.Tensor, p_aux: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels = p_main.max(dim=1).indices
        return labels, torch.ones_like(labels, dtype=torch.float32)

    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 2, 1))
    with torch.no_grad():
        for parameter, values in zip(network.parameters(), ([1], [0], [-1, 1], [0.5, -0.5]), strict=True):
            parameter.copy_(torch.tensor(values).view_as(parameter))
    callback = PseudoLabelCallback(by_intensity, guard="off", ignore_small_components=True, largest_component_share=0.0)
    data = TargetDataModule(joined, store_dir=tmp_path)
    trainer(max_epochs=1, callbacks=[callback]).fit(APLModule(network, 2, learning_rate=0.0), data)
    assert callback.statistics["pseudo/apart"] == 0


def test_patients_of_three_joined_hospitals() -> None:
    """`a + b + c` joins a and b first."""
    hospital = [{"image": torch.zeros(1, 4, 4), "label": torch.zeros(4, 4).long(), "case": "patient_1"}]
    joined = (ConcatDataset([hospital]) + ConcatDataset([hospital])) + ConcatDataset([hospital])
    cases = [sample["case"] for sample in EvaluationDataset(joined, Keys(), labelled=True)]
    assert len(set(cases)) == 3
    assert all(case.endswith("/patient_1") for case in cases)

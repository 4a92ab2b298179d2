"""What a round logs, counted by hand."""

from __future__ import annotations

import pytest
import torch

from apl_lightning.labels.statistics import LabelStatistics


def test_statistics_by_hand() -> None:
    statistics = LabelStatistics(["background", "liver"])
    labels = torch.tensor([[0, 1, 1, 1]])
    statistics.add(labels, torch.tensor([[0.0, 0.5, 0.5, 1.0]]))
    statistics.agree(labels, labels)
    statistics.compare(labels[0], torch.tensor([0, 1, 1, 0]))
    found = statistics.compute(torch.device("cpu"))
    assert found["pseudo/confidence"] == 0.5
    assert found["pseudo/class_ratio/background"] == 0.25
    assert found["pseudo/class_ratio/liver"] == 0.75
    assert found["pseudo/changed"] == 0.25


def test_agreement() -> None:
    statistics = LabelStatistics(["background", "liver"])
    statistics.add(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4))
    statistics.agree(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 0]]))
    assert statistics.compute(torch.device("cpu"))["pseudo/agreement"] == 0.75


def test_dice_with_an_absent_class() -> None:
    statistics = LabelStatistics(["background", "liver", "absent"])
    labels = torch.tensor([[1, 1, 0, 0]])
    statistics.add(labels, torch.ones(1, 4))
    statistics.agree(labels, labels)
    statistics.diagnose(labels[0], torch.tensor([1, 0, 0, 0]))
    assert statistics.compute(torch.device("cpu"))["pseudo/dice"] == pytest.approx(2 / 3)

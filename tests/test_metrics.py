"""Dice compared with torchmetrics and MONAI, and with hand-computed values where they differ."""

from __future__ import annotations

import pytest
import torch
from monai.metrics import DiceMetric
from torch.nn import functional as F
from torchmetrics.functional.segmentation import dice_score

from apl_lightning.metrics import CaseDice, overlap_counts


def test_equals_torchmetrics_and_monai() -> None:
    predictions, labels = torch.randint(4, (5, 9, 8)), torch.randint(4, (5, 9, 8))
    dice = CaseDice(4)
    dice.update(predictions[:2], labels[:2])
    dice.update(predictions[2:], labels[2:])
    theirs = dice_score(predictions, labels, 4, average="none", input_format="index").mean(0)
    torch.testing.assert_close(dice.compute(), theirs)
    one_hot = [F.one_hot(x, 4).movedim(-1, 1) for x in (predictions, labels)]
    monai = DiceMetric(include_background=True, reduction="mean_batch")
    monai(*one_hot)
    torch.testing.assert_close(dice.compute(), monai.aggregate())


def test_slices_of_a_case_count_as_one_volume() -> None:
    predictions, labels = torch.randint(3, (6, 5, 5)), torch.randint(3, (6, 5, 5))
    cases = ["a", "b", "a", "b", "b", "b"]
    slices, volumes = CaseDice(3), CaseDice(3)
    slices.update(predictions, labels, cases)
    for case in ("a", "b"):
        mine = [position for position, name in enumerate(cases) if name == case]
        volumes.update(predictions[mine][None], labels[mine][None], [case])
    torch.testing.assert_close(slices.compute(), volumes.compute())
    assert list(slices.per_case()) == ["a", "b"]


def test_absent_classes() -> None:
    dice = CaseDice(4)
    # Case 0 has only class 1, with a false positive of class 2; half of class 2 in case 1 is found.
    dice.update(torch.tensor([[1, 1, 2, 0], [2, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0], [2, 2, 0, 0]]))
    _, first, second, third = dice.compute().tolist()
    assert first == 1
    assert second == pytest.approx((0 + 2 / 3) / 2)
    assert torch.tensor(third).isnan()


def test_repeated_sample_counts_once() -> None:
    dice, once = CaseDice(3), CaseDice(3)
    predictions, labels = torch.randint(3, (3, 4, 4)), torch.randint(3, (3, 4, 4))
    once.update(predictions, labels, ["a", "a", "b"], [0, 1, 2])
    dice.update(predictions[[0, 1, 2, 0]], labels[[0, 1, 2, 0]], ["a", "a", "b", "a"], [0, 1, 2, 0])
    assert torch.equal(dice.compute(), once.compute())


def test_samples_without_index_or_case_differ_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, labels = torch.randint(3, (4, 5, 5)), torch.randint(3, (4, 5, 5))
    one, first, second = CaseDice(3), CaseDice(3), CaseDice(3)
    one.update(predictions, labels)
    first.update(predictions[:2], labels[:2])
    second.update(predictions[2:], labels[2:])
    expected = one.compute()
    monkeypatch.setattr("apl_lightning.metrics.gather", lambda _counts: [first._counts, second._counts])
    assert len(first.per_case()) == 4
    torch.testing.assert_close(first.compute(), expected)


def test_reset_dice_is_nan() -> None:
    dice = CaseDice(2)
    dice.update(torch.ones(1, 2).long(), torch.ones(1, 2).long())
    dice.reset()
    assert dice.compute().isnan().all()


def test_bad_labels_are_an_error() -> None:
    with pytest.raises(ValueError, match="between 0 and 2, but got values from 0 to 4: check `num_classes`"):
        CaseDice(3).update(torch.zeros(1, 2).long(), torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match=r"one shape \(B, \*S\)"):
        CaseDice(3).update(torch.zeros(1, 2).long(), torch.zeros(1, 3).long())

    with pytest.raises(ValueError, match="predicted classes between 0 and 2, but got values from -1 to 3"):
        CaseDice(3).update(torch.tensor([[3, -1]]), torch.zeros(1, 2).long())


def test_small_integers_do_not_overflow() -> None:
    labels = torch.arange(20, dtype=torch.uint8)[None]
    dice = CaseDice(20)
    dice.update(labels, labels)
    assert dice.compute().tolist() == [1.0] * 20


def test_order_of_overlap_counts() -> None:
    found = overlap_counts(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]), 2)
    assert found.tolist() == [[1, 1], [1, 2], [2, 1]]  # both, predicted, reference


def test_a_case_may_be_called_like_an_index() -> None:
    dice = CaseDice(2)
    label = torch.ones(1, 4, dtype=torch.long)
    for index, case, prediction in ((0, "1", label), (1, None, 0 * label)):
        dice.update(prediction, label, cases=[case], indices=[index])
    assert [found[1].item() for found in dice.per_case().values()] == [1.0, 0.0]

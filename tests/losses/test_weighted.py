"""L_SSL compared with naive implementations of the equations, with MONAI, and with hand-computed values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.losses import DiceLoss
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F

from apl_lightning.losses import weighted_cross_entropy, weighted_dice_loss

SHAPES = [(2, 3, 7), (2, 5, 6, 5), (3, 2, 3, 4, 5)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    main = (torch.randn(2, 5, 64, 64) * 20).to(dtype)
    labels, weights = torch.randint(5, (2, 64, 64)), torch.rand(2, 64, 64)
    for half, full in [
        (weighted_cross_entropy(main, labels, weights), weighted_cross_entropy(main.float(), labels, weights)),
        (weighted_dice_loss(main, labels, weights), weighted_dice_loss(main.float(), labels, weights)),
    ]:
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full)


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_cross_entropy_is_a_weighted_mean(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    spatial = (shape[0], *shape[2:])
    labels, weights = torch.randint(shape[1], spatial), torch.rand(spatial)
    flat = logits.movedim(1, -1).reshape(-1, shape[1])
    losses = [-row.log_softmax(0)[label] for row, label in zip(flat, labels.flatten(), strict=True)]
    expected = sum(w * loss for w, loss in zip(weights.flatten(), losses, strict=True)) / weights.sum()
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, weights), expected)
    torch.testing.assert_close(
        weighted_cross_entropy(logits, labels, torch.ones(spatial)), F.cross_entropy(logits, labels)
    )


def naive_dice(logits: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The equation of the weighted Dice loss in loops over pixels."""
    classes = logits.shape[1]
    soft = labels if labels.is_floating_point() else F.one_hot(labels, classes).movedim(-1, 1)
    predicted, target = (maps.movedim(1, -1).reshape(-1, classes).tolist() for maps in (logits.softmax(1), soft))
    losses = []
    for c in range(1, classes):
        both = size = found = 0.0
        for p, y, weight in zip(predicted, target, weights.flatten().tolist(), strict=True):
            both += 2 * weight * p[c] * y[c]
            size += weight * (p[c] + y[c])
            found += weight * y[c]
        if found:
            losses.append(1 - both / size)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_dice_loss_is_the_equation(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    spatial = (shape[0], *shape[2:])
    labels, weights = torch.randint(shape[1], spatial), torch.rand(spatial)
    assert weighted_dice_loss(logits, labels, weights).item() == pytest.approx(naive_dice(logits, labels, weights))
    soft = torch.randn(shape).softmax(1)
    assert weighted_dice_loss(logits, soft, weights).item() == pytest.approx(naive_dice(logits, soft, weights))


def test_classes_without_labels_do_not_count_in_the_dice_loss() -> None:
    logits, weights = torch.randn(2, 4, 30), torch.rand(2, 30)
    labels = torch.randint(3, (2, 30))  # never class 3
    assert weighted_dice_loss(logits, labels, weights).item() == pytest.approx(naive_dice(logits, labels, weights))
    weights[labels == 2] = 0  # nor class 2, for the loss
    assert weighted_dice_loss(logits, labels, weights).item() == pytest.approx(naive_dice(logits, labels, weights))
    assert weighted_dice_loss(logits, torch.zeros_like(labels), weights).item() == 0


def _dice_of_rank(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    logits, labels, weights = (tensor[rank : rank + 1] for tensor in torch.load(folder / "batch.pt"))
    logits = logits.clone().requires_grad_()
    loss = weighted_dice_loss(logits, labels, weights)
    loss.backward()
    torch.save((loss.detach(), logits.grad), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("case", ["all classes", "a class on one rank", "no weight on one rank"])
def test_dice_loss_of_two_processes_is_that_of_one(tmp_path: Path, case: str) -> None:
    logits, labels, weights = torch.randn(2, 3, 20), torch.randint(3, (2, 20)), torch.rand(2, 20)
    if case == "a class on one rank":
        labels[1] = labels[1].clamp(max=1)
    elif case == "no weight on one rank":
        weights[1] = 0
    torch.save((logits, labels, weights), tmp_path / "batch.pt")
    multiprocessing.start_processes(_dice_of_rank, (tmp_path,), nprocs=2, start_method="fork")
    logits.requires_grad_()
    loss = weighted_dice_loss(logits, labels, weights)
    loss.backward()
    for rank in range(2):
        found, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(gradient / 2, logits.grad[rank : rank + 1], msg="DDP takes the mean")


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_dice_loss_without_weights_is_that_of_monai(shape: tuple[int, ...]) -> None:
    logits, labels = torch.randn(shape), torch.randint(shape[1], (shape[0], *shape[2:]))
    options = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    criterion = DiceLoss(**options, smooth_nr=0.0, smooth_dr=0.0)
    ours = weighted_dice_loss(logits, labels, torch.ones(labels.shape))
    torch.testing.assert_close(ours, criterion(logits, labels[:, None]))


@pytest.mark.parametrize(("dice_weight", "found"), [(0.0, [False, False, True]), (1.0, [False, True, True])])
def test_dice_loss_keeps_an_organ_that_is_often_missed(dice_weight: float, found: list[bool]) -> None:
    """Pixels of three kinds: in 10, 40 and 60 % of 100, labels call them an organ; 9000 others are background.

    Pixels that look alike get one prediction. Cross-entropy takes the majority. The Dice loss takes pixels in which the
    organ is more probable than half the Dice that can be reached (here 2 (40 + 60) / (200 + 110) = 0.65).
    """
    labels = torch.cat([*(torch.arange(100) < count for count in (10, 40, 60)), torch.zeros(9000)])[None].long()
    kinds = torch.arange(4).repeat_interleave(torch.tensor([100, 100, 100, 9000]))
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        arguments = logits[:, :, kinds], labels, torch.ones(1, 9300)
        loss = weighted_cross_entropy(*arguments) + dice_weight * weighted_dice_loss(*arguments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits[0, 1] > logits[0, 0]).tolist() == [*found, False]


@pytest.mark.parametrize("loss_of", [weighted_cross_entropy, weighted_dice_loss])
def test_zero_weights_give_zero_loss_and_gradients(loss_of: Callable[..., Tensor]) -> None:
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = loss_of(logits, torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_bad_input_is_an_error() -> None:
    logits, labels, weights = torch.randn(1, 3, 4), torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4)
    with pytest.raises(ValueError, match="between 0 and 2, but got values from 0 to 3: check `num_classes`"):
        weighted_cross_entropy(logits, torch.tensor([[0, 1, 2, 3]]), weights)
    with pytest.raises(ValueError, match=r"`labels` \(B, \*S\)"):
        weighted_cross_entropy(logits, labels[:, :2], weights[:, :2])
    with pytest.raises(ValueError, match=r"`labels` \(B, \*S\)"):
        weighted_dice_loss(logits, labels[:, :2], weights[:, :2])


def test_masked_class_as_an_ignored_label() -> None:
    """A logit of minus infinity has an infinite cross-entropy, which weight 0 ignores."""
    logits = torch.tensor([[[0.0, 1.0], [-torch.inf, -torch.inf], [0.0, 2.0]]], requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_weights_with_a_sum_below_1() -> None:
    labels = torch.tensor([[0, 1, 1]])
    assert weighted_cross_entropy(
        torch.zeros(1, 2, 3), labels, torch.tensor([[0.1, 0.2, 0.0]])
    ).item() == pytest.approx(math.log(2))

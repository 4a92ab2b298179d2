"""Balanced weights compared with a loop over classes, by hand, and over two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from apl_lightning.losses import balanced_weights


@pytest.mark.parametrize("shape", [(2, 9), (3, 5, 6), (2, 3, 4, 5)])
def test_equals_the_equation(shape: tuple[int, ...]) -> None:
    labels, weights = torch.randint(4, shape), torch.rand(shape) * torch.randint(2, shape)
    counted = [weights[(labels == c) & (weights > 0)] for c in range(4)]
    means = [float(of_class.mean()) if len(of_class) else 0.0 for of_class in counted]
    found = balanced_weights(labels, weights, 4)
    for c, mean in enumerate(means):
        rise = min(2.0, max(means) / mean) if mean else 1.0
        torch.testing.assert_close(found[labels == c], (rise * weights[labels == c]).clamp(max=1))
    one_hot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    assert torch.equal(balanced_weights(one_hot * 0.6 + 0.1, weights, 4), found)


def test_a_rare_and_unsure_class_at_most_doubles() -> None:
    labels, weights = torch.tensor([[0, 1, 2]]), torch.tensor([[0.98, 0.3, 0.001]])
    torch.testing.assert_close(balanced_weights(labels, weights, 4), torch.tensor([[0.98, 0.6, 0.002]]))


def test_weights_of_0_and_1_stay() -> None:
    """Those of a threshold, say: the pixels that it ignores do not count in the mean of a class."""
    labels, weights = torch.randint(4, (2, 50)), torch.randint(2, (2, 50)).float()
    assert torch.equal(balanced_weights(labels, weights, 4), weights)


def _balance_of_rank(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    labels, weights = torch.load(folder / "batch.pt")
    torch.save(balanced_weights(labels[rank][None], weights[rank][None], 3), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_balance_as_one(tmp_path: Path) -> None:
    labels, weights = torch.randint(3, (2, 40)), torch.rand(2, 40)
    torch.save((labels, weights), tmp_path / "batch.pt")
    multiprocessing.start_processes(_balance_of_rank, (tmp_path,), nprocs=2, start_method="fork")
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    torch.testing.assert_close(found, balanced_weights(labels, weights, 3))


def test_indices_in_floating_point() -> None:
    """The losses take them too."""
    labels, weights = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1.0, 0.6, 0.3, 0.7, 0.0]])
    assert torch.equal(balanced_weights(labels.float(), weights, 2), balanced_weights(labels, weights, 2))

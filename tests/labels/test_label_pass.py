"""The label pass: its random numbers and its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apl_lightning.labels.label_pass import predict
from apl_lightning.labels.target_images import ImageBatch


def test_dropout_of_each_batch() -> None:

    def drawn(starts: list[int]) -> dict[int, Tensor]:
        batches = [ImageBatch([n], torch.rand(1, 1, 2, 2), [None], [""], [torch.zeros(1)]) for n in starts]
        found = {}
        for batch, (p, _) in predict(batches, lambda images: (torch.rand(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)), 7, 2):
            found[batch.indices[0]] = p
        return found

    alone, all_of_them = drawn([2]), drawn([0, 1, 2])
    assert torch.equal(alone[2], all_of_them[2])
    assert not torch.equal(all_of_them[0], all_of_them[1])


@pytest.mark.parametrize("head", [0, 1])
def test_nan_of_either_head(head: int) -> None:
    batch = ImageBatch([4, 5], torch.rand(2, 1, 2, 2), [None] * 2, [""] * 2, [torch.zeros(1)] * 2)
    made = [torch.full((2, 2, 2, 2), 0.5) for _ in range(2)]
    made[head][1, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"the network gave NaN for samples \[5\]"):
        next(predict([batch], lambda images: tuple(made), 0, 2))

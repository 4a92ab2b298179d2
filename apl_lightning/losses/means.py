"""Means over the pixels of all ranks, and over both heads."""

from collections.abc import Callable

import torch
from torch import Tensor

from apl_lightning._support.distributed import total, world_size


def joint_mean(values: Tensor, weights: Tensor) -> Tensor:
    """This rank's share of the weighted mean over all ranks, scaled for the mean of gradients that DDP takes."""
    weights = weights.to(values.dtype)
    values = torch.where(weights > 0, values, 0)  # infinite, if a masked class is the label
    mean_weight = total(weights.sum().detach()) / world_size()
    return (weights * values).sum() / torch.where(mean_weight > 0, mean_weight, 1)


def mean_over_heads(loss: Callable[[Tensor], Tensor], main: Tensor, aux: Tensor) -> Tensor:
    """The mean of a loss of logits over both heads."""
    return torch.stack([loss(main), loss(aux)]).mean()

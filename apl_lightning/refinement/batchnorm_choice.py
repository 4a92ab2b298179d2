"""Choose between the BatchNorm statistics of the source and those of the target images."""

import torch
from torch import Tensor, nn

from apl_lightning.guard import IN_DOUBT
from apl_lightning.refinement.batchnorm import batch_norms

Statistics = list[dict[str, Tensor]]  # of each layer: its buffers


class BatchNormChoice:
    """Keeps the statistics of a network before they are re-estimated.

    Args:
        model: The network with the statistics of the source.
    """

    def __init__(self, model: nn.Module) -> None:
        self._source = _statistics_of(model)

    def choose(self, model: nn.Module, gain: float) -> str:
        """Set the statistics of a network with re-estimated ones by their estimated gain of Dice; returns which.

        Below one point either way, the choice is in doubt and takes the mean of both.
        """
        if gain >= IN_DOUBT:
            return "those re-estimated on the target images"
        if gain > -IN_DOUBT:
            _load(model, _mean(self._source, _statistics_of(model)))
            return "the mean of those of the source and those re-estimated on the target images"
        _load(model, self._source)
        return "those of the source"


def _statistics_of(model: nn.Module) -> Statistics:
    return [{name: value.clone() for name, value in layer.named_buffers()} for layer in batch_norms(model)]


def _load(model: nn.Module, statistics: Statistics) -> None:
    for layer, values in zip(batch_norms(model), statistics, strict=True):
        layer.load_state_dict(values, strict=False)


def _mean(ones: Statistics, others: Statistics) -> Statistics:
    """The mean of the running means and variances of two networks; the counts of batches are those of the first one."""
    return [
        {
            name: torch.lerp(value, other[name], 0.5) if value.is_floating_point() else value
            for name, value in one.items()
        }
        for one, other in zip(ones, others, strict=True)
    ]

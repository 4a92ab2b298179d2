"""In which order samples come, on which rank, and from where on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import Dataset, DistributedSampler


@dataclass(frozen=True)
class Draw:
    """One sample of an epoch: its index, and whether it is there a second time to fill up the last batch."""

    index: int
    epoch: int
    repeated: bool


class EpochSampler(DistributedSampler[Any]):
    """Deals out the samples in an order of (seed, epoch) alone, and begins in the middle of a resumed epoch.

    It yields a `Draw`, so that the data set knows the epoch in whatever process it is. Several ranks together see in
    each step what one process with the joint batch size would see; what torch repeats where they cannot share evenly
    is marked and counts for nothing. A torch `DistributedSampler`, so Lightning keeps it and tells it the epoch.

    Args:
        dataset: The data set.
        world_size: Number of ranks.
        rank: This one.
        seed: The same on all ranks.
        done: Called when an epoch begins: how many of its samples this rank has had before an interruption.

    Examples:
        >>> from apl_lightning import EpochSampler
        >>> ranks = [EpochSampler(range(4), world_size=2, rank=rank, seed=0, done=lambda: 0) for rank in (0, 1)]
        >>> sorted(draw.index for sampler in ranks for draw in sampler)
        [0, 1, 2, 3]
        >>> resumed = EpochSampler(range(4), world_size=2, rank=0, seed=0, done=lambda: 1)
        >>> resumed.set_epoch(5)
        >>> [draw.epoch for draw in resumed]
        [5]
    """

    def __init__(self, dataset: Sized, world_size: int, rank: int, seed: int, done: Callable[[], int]) -> None:
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self._length = len(dataset)
        self._done = done

    def __iter__(self) -> Iterator[Draw]:
        for place, index in list(enumerate(super().__iter__()))[self._done() :]:
            yield Draw(index, self.epoch, repeated=place * self.num_replicas + self.rank >= self._length)

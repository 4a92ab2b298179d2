"""In which order samples come, on which rank, and from where on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

from torch.utils.data import Dataset, DistributedSampler


class EpochSampler(DistributedSampler[Any]):
    """Deals out the samples in an order of (seed, epoch) alone, and begins in the middle of a resumed epoch.

    It yields `epoch * length + index`, so that the data set knows the epoch in whatever process it is. Several ranks
    together see in each step what one process with the joint batch size would see. A torch `DistributedSampler`, so
    Lightning keeps it and tells it the epoch.

    Args:
        dataset: The data set.
        world_size: Number of ranks.
        rank: This one.
        seed: The same on all ranks.
        done: Called when an epoch begins: how many of its samples this rank has had before an interruption.

    Examples:
        >>> from apl_lightning import EpochSampler
        >>> ranks = [EpochSampler(range(4), world_size=2, rank=rank, seed=0, done=lambda: 0) for rank in (0, 1)]
        >>> sorted(index for sampler in ranks for index in sampler)
        [0, 1, 2, 3]
        >>> resumed = EpochSampler(range(4), world_size=2, rank=0, seed=0, done=lambda: 1)
        >>> resumed.set_epoch(5)
        >>> [divmod(index, 4)[0] for index in resumed]
        [5]
    """

    def __init__(self, dataset: Sized, world_size: int, rank: int, seed: int, done: Callable[[], int]) -> None:
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self._length = len(dataset)
        self._done = done

    def __iter__(self) -> Iterator[int]:
        for index in list(super().__iter__())[self._done() :]:
            yield self.epoch * self._length + index

"""In which order samples come, on which rank, and from where on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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
    """

    def __init__(self, dataset: Dataset[Any], world_size: int, rank: int, seed: int, done: Callable[[], int]) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self._done = done

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type] # a map-style data set
        for index in list(super().__iter__())[self._done() :]:
            yield self.epoch * length + index

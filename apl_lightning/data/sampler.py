"""The order of samples in an epoch, on each rank, also after a resume."""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import Dataset, DistributedSampler


@dataclass(frozen=True)
class DrawnSample:
    """A sample of an epoch; `repeated` if it appears a second time, only to fill the last batch."""

    index: int
    epoch: int
    repeated: bool


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch), splits the samples among ranks, and skips what was done before a resume.

    It yields `DrawnSample`s, so that the data set knows the epoch in every worker. In each step all ranks together see
    what one process sees with the joint batch size. Samples that fill up uneven shares are marked as repeated and do
    not count. It is a torch `DistributedSampler`, so Lightning keeps it and sets its epoch. At the start of an epoch
    `done` returns how many samples of it this rank has done before a resume.

    Examples:
        >>> from apl_lightning.data import EpochSampler
        >>> ranks = [EpochSampler(range(4), world_size=2, rank=rank, seed=0, done=lambda: 0) for rank in (0, 1)]
        >>> sorted(drawn.index for sampler in ranks for drawn in sampler)
        [0, 1, 2, 3]
    """

    def __init__(self, dataset: Sized, world_size: int, rank: int, seed: int, done: Callable[[], int]) -> None:
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self._length = len(dataset)
        self._done = done

    def __iter__(self) -> Iterator[DrawnSample]:
        for place, index in list(enumerate(super().__iter__()))[self._done() :]:
            yield DrawnSample(index, self.epoch, repeated=place * self.num_replicas + self.rank >= self._length)

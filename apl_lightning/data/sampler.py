"""The order of samples in an epoch, on each rank, also after a resume."""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import Dataset, DistributedSampler


@dataclass(frozen=True)
class DrawnSample:
    """A sample of the `turn`-th pass over the data set; `repeated` if it only fills the last batch."""

    index: int
    turn: int
    repeated: bool


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch), splits the samples among ranks, and skips what was done before a resume.

    It yields `DrawnSample`s, so that the data set knows the pass in every worker. In each step all ranks together see
    what one process sees with the joint batch size. Samples that fill up uneven shares are marked as repeated and do
    not count. It is a torch `DistributedSampler`, so Lightning keeps it and sets its epoch. At the start of an epoch
    `done` returns how many samples of it this rank has done before a resume.

    An epoch is one pass over the data set or, with `samples`, so many samples of all ranks, a multiple of `world_size`:
    the passes then follow each other without regard to epochs.

    Examples:
        >>> from apl_lightning.data import EpochSampler
        >>> ranks = [EpochSampler(range(4), world_size=2, rank=rank, seed=0, done=lambda: 0) for rank in (0, 1)]
        >>> sorted(drawn.index for sampler in ranks for drawn in sampler)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        dataset: Sized,
        world_size: int,
        rank: int,
        seed: int,
        done: Callable[[], int],
        samples: int | None = None,
    ) -> None:
        super().__init__(cast("Dataset[Any]", dataset), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self._length = len(dataset)
        self._done = done
        self._samples = samples
        if samples is not None:
            self.num_samples = samples // world_size  # torch's name for the share of a rank, its `len`

    def __iter__(self) -> Iterator[DrawnSample]:
        places = range(self.rank, self.num_samples * self.num_replicas, self.num_replicas)[self._done() :]
        if self._samples is None:
            indices = list(super().__iter__())
            for place in places:
                repeated = place >= self._length
                yield DrawnSample(indices[place // self.num_replicas], self.epoch, repeated)
            return
        turn, order = -1, torch.empty(0, dtype=torch.int64)
        for place in places:
            drawn, position = divmod(self.epoch * self._samples + place, self._length)
            if drawn != turn:
                turn = drawn
                order = torch.randperm(self._length, generator=torch.Generator().manual_seed(self.seed + turn))
            yield DrawnSample(int(order[position]), turn, repeated=False)

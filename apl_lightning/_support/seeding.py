"""Random numbers that depend on their purpose, not on earlier draws.

The augmentation of a sample is drawn from (seed, pass over the data set, index), the dropout of a step from (seed,
epoch, batch, rank). So results depend on neither the number of workers nor an interruption.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import getclosurevars, isfunction
from typing import Any

import numpy as np
import torch

from apl_lightning._support.distributed import broadcast
from apl_lightning._support.random_state import isolated_random_state


def derived_seed(*numbers: int) -> int:
    """A 32-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    # NumPy pads its words with zeros: without their count, (1, 2) and (1, 2, 0) were the same.
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


def run_seed() -> int:
    """The seed of a run: torch's initial seed on rank 0, the same on all ranks."""
    seed: int = broadcast(torch.initial_seed() % 2**32)
    return seed


@contextmanager
def seeded(seed: int, transform: Any = None) -> Iterator[None]:
    """Seed Python, NumPy, torch and a MONAI transform inside the block; restore the global states afterwards.

    Of a function, the transforms that it names are seeded. GPUs are seeded too, and stay so: to read their states would
    cost every sample a synchronisation.
    """
    with isolated_random_state(cuda=False):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - used by transforms without a generator of their own
        torch.manual_seed(seed)
        for each in [transform] if hasattr(transform, "set_random_state") else _named_by(transform):
            if callable(set_random_state := getattr(each, "set_random_state", None)):
                set_random_state(seed=seed)
        yield


def _named_by(function: Any) -> list[Any]:
    """What a function names, what a `partial` binds, and the attributes of another object that is called."""
    if isinstance(function, partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isfunction(function):
        names = getclosurevars(function)
        return [*names.nonlocals.values(), *names.globals.values()]
    return list(vars(function).values()) if hasattr(function, "__dict__") else []

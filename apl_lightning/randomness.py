"""Random numbers that depend on what they are for, not on what was drawn before.

A sample's augmentation is drawn from (seed, epoch, index) and a step's dropout from (seed, epoch, batch, rank). So the
number of workers and processes changes nothing, and a run that was killed and resumed goes on as if it had not been.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from apl_lightning._lightning import Trainer, isolate_rng


def derived_seed(*numbers: int) -> int:
    """One seed from several numbers, 32 bits; neighbours give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def run_seed(trainer: Trainer | None) -> int:
    """What a run's random numbers depend on: torch's seed on rank 0, the same on all ranks."""
    seed = torch.initial_seed() % 2**32
    return seed if trainer is None else trainer.strategy.broadcast(seed)


@contextmanager
def drawing_from(seed: int, transform: Any = None) -> Iterator[None]:
    """Inside, Python, NumPy, torch and a MONAI transform draw from `seed`; afterwards from where they were."""
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what transforms without a generator of their own use
        torch.manual_seed(seed)
        if callable(set_random_state := getattr(transform, "set_random_state", None)):
            set_random_state(seed=seed)
        yield

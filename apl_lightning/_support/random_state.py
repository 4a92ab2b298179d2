"""The global random state of Python, NumPy and torch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated_random_state(cuda: bool) -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch, of its GPUs on request, after the block."""
    devices = range(torch.cuda.device_count()) if cuda and torch.cuda.is_available() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002

"""A copy of a data set for what the main process reads, so that its workers open files themselves."""

import io
import pickle
from typing import Any

import numpy as np
from torch import Tensor

_SHARED = (Tensor, np.ndarray, bytes)


def unopened_copy(dataset: Any) -> Any:
    """A copy that shares arrays with the data set, but not the files that reading opens; itself if it has no copy.

    Many data sets open an archive with the first sample that they read. If the main process reads one, its workers
    inherit the open file and its position, and read each other's bytes.
    """
    shared: list[Any] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, _SHARED):
                return None
            shared.append(value)
            return len(shared) - 1

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Any:
            return shared[number]

    content = io.BytesIO()
    try:
        Pickler(content).dump(dataset)
        content.seek(0)
        return Unpickler(content).load()
    except Exception:  # such as a function without a name, which forked workers do not need to pickle
        return dataset

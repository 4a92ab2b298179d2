"""The numbers of NumPy that a checkpoint may hold, such as losses that were logged."""

from typing import Any

import numpy as np


def numpy_numbers() -> list[Any]:
    """What they consist of in a file, for `torch.serialization.safe_globals`: no code is executed to load them."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # of NumPy 1 and 2
    types = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")]
    return [*((scalar, name) for name in names), np.dtype, *types]

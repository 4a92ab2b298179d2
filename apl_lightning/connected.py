"""The largest connected component of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def largest_component(mask: NDArray[np.bool_], weights: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """The connected component with the most pixels, or with the largest sum of `weights`, of a mask (*S) of some.

    Pixels touch by faces; of equal components the first one counts.
    """
    components, _ = ndimage.label(mask)
    sizes = np.bincount(components[mask], None if weights is None else weights[mask])
    largest: NDArray[np.bool_] = components == sizes[1:].argmax() + 1
    return largest

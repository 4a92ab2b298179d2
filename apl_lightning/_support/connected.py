"""The largest connected component of a mask."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def largest_component(mask: NDArray[np.bool_], weights: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """The connected component of a mask (*S) with the most pixels, or with the largest sum of `weights`.

    Pixels are connected by faces. Of equal components, the first one is taken. The mask must not be empty.
    """
    components, _ = ndimage.label(mask)
    sizes = np.bincount(components[mask], None if weights is None else weights[mask])
    largest: NDArray[np.bool_] = components == sizes[1:].argmax() + 1
    return largest

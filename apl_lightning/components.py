"""What lies apart from the largest connected component of its class in a patient shall lose its weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from apl_lightning import ranks
from apl_lightning.connected import largest_component
from apl_lightning.round_files import RoundReader

# On real CT the small organs of networks that are worth refining were at 0.78 to 0.92, those of a hopeless one, which
# ends lower if its components are ignored, at 0.53 to 0.71.
_WHOLE = 0.75


class Apart(NamedTuple):
    """The pixels of each sample that shall be ignored (in C order), and their part of the foreground's confidence."""

    pixels: dict[int, NDArray[Any]]
    part: float


def small_components(reader: RoundReader, num_classes: int) -> Apart:
    r"""Find what lies apart from the largest connected component of its class in its volume.

    An organ is one piece; what a network calls so elsewhere seldom is. The size $m_{vk}$ of component $k$ of a class in
    volume $v$ is the sum of its weights $\omega$, so that one of which the heads are sure counts most. Only a class
    that is nearly one piece,

    $$\sum_v \max_k m_{vk} \ge \tfrac{3}{4} \sum_v \sum_k m_{vk},$$

    is treated so, and loses a quarter of its weight at most. A class in many pieces (lesions, vessels), one that the
    network does not know yet, and the background are left as they are.

    A volume is a sample in 3D, and in 2D all slices of one case and size in the order of the data set, which must be
    theirs in the body: components touch by faces. Slices of no known case are left as they are.

    Every rank searches its share of the volumes; all call it and have the same answer.

    Args:
        reader: A round that all ranks have written.
        num_classes: Background (class 0) included.

    Examples:
        >>> import tempfile, torch
        >>> from apl_lightning import PseudoLabelStore
        >>> from apl_lightning.components import small_components
        >>> store = PseudoLabelStore(tempfile.mkdtemp(), length=1)
        >>> with store.write(round=0, num_classes=2) as writer:
        ...     writer.add(0, torch.tensor([[1, 1, 1, 0, 1]]), torch.ones(1, 5), case="patient")
        >>> store.join(round=0)
        >>> small_components(store.reader(round=0), num_classes=2)
        Apart(pixels={0: array([4])}, part=0.25)
    """
    sizes = np.zeros((2, num_classes), dtype=np.int64)  # of the largest components, of all
    found: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}  # sample: pixels, and their classes
    with ranks.together("Looking for small components"):
        for volume in list(_volumes(reader))[ranks.rank() :: ranks.world_size()]:
            apart = _apart(*_stack(reader, volume), sizes)
            for index, classes in zip(volume, apart.reshape(len(volume), -1), strict=True):
                there = np.flatnonzero(classes)
                found[index] = there, classes[there]
    sizes = np.sum(ranks.gather(sizes), axis=0)
    whole = sizes[0] >= _WHOLE * sizes[1]
    everywhere = {index: entry for part in ranks.gather(found) for index, entry in part.items()}
    pixels = {index: there[whole[classes]] for index, (there, classes) in everywhere.items()}
    lost = (sizes[1] - sizes[0])[whole].sum()
    return Apart(pixels, float(lost / max(1, sizes[1].sum())))


def _volumes(reader: RoundReader) -> Iterator[list[int]]:
    """The samples of each volume."""
    slices: dict[tuple[Any, ...], list[int]] = {}
    for index, case in enumerate(reader.cases):
        shape = reader.shape(index)
        if len(shape) > 2:
            yield [index]
        elif case:
            slices.setdefault((case, *shape), []).append(index)
    yield from slices.values()


def _stack(reader: RoundReader, volume: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels and weights (in 255ths, which add up exactly) of a volume, (D, *S)."""
    labels, weights = (np.stack(arrays) for arrays in zip(*(reader.stored(index) for index in volume), strict=True))
    return (labels, weights) if len(volume) > 1 else (labels[0], weights[0])


def _apart(labels: NDArray[Any], weights: NDArray[Any], sizes: NDArray[np.int64]) -> NDArray[Any]:
    """The labels where they lie apart from the largest component of their class, 0 elsewhere; adds up `sizes`."""
    apart = np.zeros_like(labels)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        here = labels[box] == number
        largest = largest_component(here, weights[box])
        sizes[:, number] += [int(weights[box][pixels].sum(dtype=np.int64)) for pixels in (largest, here)]
        apart[box][here & ~largest] = number
    return apart

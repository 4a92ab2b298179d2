"""What lies apart from the largest piece of its class in a patient: it keeps its label and loses its weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from apl_lightning import ranks
from apl_lightning.round_files import RoundReader

_WHOLE = 0.75


class Apart(NamedTuple):
    """The pixels of each sample that shall be ignored (in C order), and their part of the foreground's confidence."""

    pixels: dict[int, NDArray[Any]]
    part: float


def small_pieces(reader: RoundReader, num_classes: int) -> Apart:
    r"""Find what lies apart from the largest connected component of its class in its volume.

    The size of a component is the sum of its weights, so that one of which the heads are sure counts most. A class
    in pieces by its nature (lesions, vessels), or which the network does not know yet, is left as it is: over all
    volumes, the largest components must hold at least three quarters of the class. So no class loses more than a
    quarter. The background is left as it is too.

    A volume is a sample in 3D, and in 2D all slices of one case and size in the order of the data set, which must be
    theirs in the body: pieces touch by faces. Slices of no known case are left as they are.

    Every rank searches its share of the volumes; all call it and have the same answer.

    Args:
        reader: A round that all ranks have written.
        num_classes: Background (class 0) included.
    """
    sizes = np.zeros((2, num_classes), dtype=np.int64)  # of the largest components, of all
    found: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}  # sample: pixels, and their classes
    with ranks.together("Looking for pieces that lie apart"):
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


def _stack(reader: RoundReader, volume: list[int]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Labels and weights (in 255ths, which add up exactly) of a volume, (D, *S)."""
    samples = [reader.read(index) for index in volume]
    labels = np.stack([sample.classes.numpy().astype(np.uint16) for sample in samples])
    weights = np.stack([np.rint(255 * sample.weights.numpy()) for sample in samples])
    return (labels, weights) if len(volume) > 1 else (labels[0], weights[0])


def _apart(labels: NDArray[np.uint16], weights: NDArray[np.float32], sizes: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The labels where they lie apart from the largest component of their class, 0 elsewhere; adds up `sizes`."""
    apart = np.zeros_like(labels)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        components, _ = ndimage.label(labels[box] == number)
        masses = np.bincount(components.ravel(), weights[box].ravel())[1:]
        largest = int(masses.argmax())
        sizes[:, number] += np.array([masses[largest], masses.sum()], dtype=np.int64)
        apart[box][(components > 0) & (components != largest + 1)] = number
    return apart

"""Find small components: all components of a class in a patient except the largest one."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from apl_lightning._support import distributed
from apl_lightning._support.connected import largest_component
from apl_lightning.store import RoundReader

# On real CT the largest components of small organs held 0.78 to 0.92 of their weight for networks worth refining, and
# 0.53 to 0.71 for a very weak network, which ends lower if its small components are ignored.
LARGEST_COMPONENT_SHARE = 0.75


class SmallComponents(NamedTuple):
    """The pixels of each sample to ignore (indices in C order) and their share of the foreground's confidence."""

    pixels: dict[int, NDArray[Any]]
    share: float


def find_small_components(
    reader: RoundReader, num_classes: int, largest_component_share: float = LARGEST_COMPONENT_SHARE
) -> SmallComponents:
    r"""Find all components of each class but the largest one in each volume.

    An organ is one connected component; other components of its class are mostly errors. The size $m_{vk}$ of component
    $k$ of a class in volume $v$ is the sum of its weights $\omega$, so confident components are large. Only classes
    whose largest components hold most of the weight,

    $$\sum_v \max_k m_{vk} \ge s \sum_v \sum_k m_{vk},$$

    are treated this way, with s = 3/4 by default, so a class loses at most a quarter of its weight. Classes with many
    components (lesions, vessels, an organ that the network does not know yet) and the background are exempt.

    A volume is a sample in 3D. In 2D it is all slices of one case and one size, in the order of the data set, which
    must be their order in the body, since pixels are connected by faces. Slices without a case are exempt.

    Every rank searches its share of the volumes. All ranks call it and get the same result.

    Args:
        reader: A round with the labels of all ranks.
        num_classes: Number of classes, background (class 0) included.
        largest_component_share: s, the share of the weight that the largest components of a class must hold.

    Examples:
        >>> import tempfile, torch
        >>> from apl_lightning import PseudoLabelStore
        >>> from apl_lightning.labels import find_small_components
        >>> store = PseudoLabelStore(tempfile.mkdtemp(), length=1)
        >>> with store.write(round=0, num_classes=2) as writer:
        ...     writer.add(0, torch.tensor([[1, 1, 1, 0, 1]]), torch.ones(1, 5), case="patient")
        >>> store.join(round=0)
        >>> find_small_components(store.reader(round=0), num_classes=2)
        SmallComponents(pixels={0: array([4])}, share=0.25)
    """
    sizes = np.zeros((2, num_classes), dtype=np.int64)  # of the largest components, of all
    found: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}  # sample: pixels, and their classes
    with distributed.all_or_none("Looking for small components"):
        for volume in list(_volumes(reader))[distributed.rank() :: distributed.world_size()]:
            small = _outside_largest(*_stack(reader, volume), sizes)
            for index, classes in zip(volume, small.reshape(len(volume), -1), strict=True):
                pixels = np.flatnonzero(classes)
                found[index] = pixels, classes[pixels]
    sizes = np.sum(distributed.gather(sizes), axis=0)
    treated = sizes[0] >= largest_component_share * sizes[1]
    # Those of exempt classes, such as vessels, may be many: they stay where they are.
    ours = {index: pixels[treated[classes]] for index, (pixels, classes) in found.items()}
    ignored = {index: pixels for part in distributed.gather(ours) for index, pixels in part.items()}
    lost = (sizes[1] - sizes[0])[treated].sum()
    return SmallComponents(ignored, float(lost / max(1, sizes[1].sum())))


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
    """Labels and weights (in steps of 1/255, whose sums are exact) of a volume, (D, *S)."""
    labels, weights = (np.stack(arrays) for arrays in zip(*(reader.stored(index) for index in volume), strict=True))
    return (labels, weights) if len(volume) > 1 else (labels[0], weights[0])


def _outside_largest(labels: NDArray[Any], weights: NDArray[Any], sizes: NDArray[np.int64]) -> NDArray[Any]:
    """The labels outside the largest component of their class, 0 elsewhere; adds to `sizes`."""
    small = np.zeros_like(labels)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        mask = labels[box] == number
        largest = largest_component(mask, weights[box])
        sizes[:, number] += [int(weights[box][pixels].sum(dtype=np.int64)) for pixels in (largest, mask)]
        small[box][mask & ~largest] = number
    return small

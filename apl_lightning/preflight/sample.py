"""The images that preflight asks a network about, in parts that vote."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from apl_lightning.data import Keys, length_of, read_joined
from apl_lightning.preflight.views import cut

_PART = 8  # slices that vote together
_MOST = 32  # slices
_MOST_VOLUMES = 4


def sample_of(images: Any, keys: Keys, most: int | None) -> tuple[list[Tensor], int]:
    """Some images (C, *S), spread over the data set, and the number of their cases; without a case, each is its own."""
    length = length_of(images)
    if most is not None and most < 1:
        raise ValueError(f"Expected `max_images` to be at least 1, but got {most}.")
    first = read_joined(images, keys, 0)["image"]
    count = min(length, most or (_MOST_VOLUMES if first.ndim == 4 else _MOST))
    indices = [(2 * place + 1) * length // (2 * count) for place in range(count)]
    samples = [read_joined(images, keys, index) for index in indices]
    cases = {sample.get("case", index) for index, sample in zip(indices, samples, strict=True)}
    return [sample["image"] for sample in samples], len(cases)


def centre(image: Tensor, most: int) -> Tensor:
    """The centre of an image (C, *S) with at most `most` pixels, its longest axes cut; a view."""
    size, left = list(image.shape[1:]), most
    for done, axis in enumerate(sorted(range(len(size)), key=size.__getitem__)):
        size[axis] = cut(size[axis], int(left ** (1 / (len(size) - done))))
        left = left // size[axis]
    for axis, kept in enumerate(size, start=1):
        image = image.narrow(axis, (image.shape[axis] - kept) // 2, kept)
    return image


def parts_of(images: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Volumes one by one; slices in parts that are each spread over all of them."""
    count = len(images) if images[0].ndim == 4 else max(1, len(images) // _PART)
    return [images[part::count] for part in range(count)]

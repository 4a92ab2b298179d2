"""Turns and flips of images: the 8 of a plane, and the 48 of a volume in steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

from torch import Tensor


@dataclass(frozen=True)
class Orientation:
    """A permutation of the spatial axes and then flips, one entry per axis.

    Examples:
        >>> import torch
        >>> image = torch.arange(4).view(1, 2, 2)
        >>> turn = Orientation((1, 0), (True, False))
        >>> torch.equal(turn(image), torch.rot90(image, 1, (-2, -1)))
        True
        >>> turn.looks, turn.code
        ('rotated by 90 degrees clockwise', 'torch.rot90(image, 1, (-2, -1))')
    """

    axes: tuple[int, ...]
    flips: tuple[bool, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Turn images (..., *S)."""
        count = len(self.axes)
        leading = list(range(images.ndim - count))
        turned = images.permute(*leading, *(len(leading) + axis for axis in self.axes))
        return turned.flip(self._flipped)

    @property
    def looks(self) -> str:
        """How images look that this orientation puts right."""
        count, moved, flipped = len(self.axes), self._moved, self._flipped
        where = "" if count == 2 else f" in the plane of the axes {_listed(self._plane)}"
        if not moved:
            return f"rotated by 180 degrees{where}" if len(flipped) == 2 else f"flipped along the {_named(flipped)}"
        if len(moved) == 2 and flipped in ([moved[0]], [moved[1]]):
            return f"rotated by 90 degrees {'clockwise' if flipped == [moved[0]] else 'counter-clockwise'}{where}"
        more = f", and flipped along the {_named(flipped)}" if flipped else ""
        order = "with rows and columns exchanged" if count == 2 else "with their axes in another order"
        return order + more

    @property
    def code(self) -> str:
        """The expression that applies it to an `image` (..., *S)."""
        moved, flipped = self._moved, self._flipped
        if (not moved and len(flipped) == 2) or (len(moved) == 2 and flipped in ([moved[0]], [moved[1]])):
            times = 2 if not moved else 1 if flipped == [moved[0]] else 3
            return f"torch.rot90(image, {times}, ({_listed(self._plane)}))"
        code = "image"
        if len(moved) == 2:
            code += f".transpose({_listed(moved)})"
        elif moved:
            order = [axis - len(self.axes) for axis in self.axes]
            code += f".movedim(({_listed(order)}), ({_listed(sorted(order))}))"
        return code + (f".flip({_listed(flipped)})" if flipped else "")

    @property
    def _flipped(self) -> list[int]:
        """The flipped axes, counted from the end."""
        return [axis - len(self.flips) for axis, flip in enumerate(self.flips) if flip]

    @property
    def _moved(self) -> list[int]:
        return [place - len(self.axes) for place, axis in enumerate(self.axes) if place != axis]

    @property
    def _plane(self) -> list[int]:
        return self._moved or self._flipped


def first_orientations(dimensions: int) -> list[Orientation]:
    """All turns and flips of a plane but the identity; of a volume the orders of its axes, and flips in each."""
    return [one for one in _all(dimensions) if one != _identity(dimensions) and _is_first(one)]


def next_orientations(best: Orientation) -> list[Orientation]:
    """The flips of a volume after the best order of its axes."""
    return [Orientation(best.axes, flips) for flips in product((False, True), repeat=len(best.axes)) if any(flips)]


def _all(dimensions: int) -> list[Orientation]:
    orders = permutations(range(dimensions))
    return [Orientation(axes, flips) for axes in orders for flips in product((False, True), repeat=dimensions)]


def _identity(dimensions: int) -> Orientation:
    return Orientation(tuple(range(dimensions)), (False,) * dimensions)


def _is_first(orientation: Orientation) -> bool:
    """Whether it belongs to the first step: in a volume, no flip after a change of the order of the axes."""
    dimensions = len(orientation.axes)
    return dimensions < 3 or orientation.axes == tuple(range(dimensions)) or not any(orientation.flips)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _named(axes: Sequence[int]) -> str:
    names = {-1: "last axis", -2: "last axis but one", -3: "first axis"}
    return " and the ".join(names[axis] for axis in axes)

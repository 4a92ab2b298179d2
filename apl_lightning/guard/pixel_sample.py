"""Some pixels of each target image: their features, and the classes that networks predict there."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from apl_lightning._support.distributed import all_or_none, broadcast, gather, rank
from apl_lightning._support.seeding import derived_seed
from apl_lightning.guard.gain import estimate_gain, second_opinion
from apl_lightning.guard.pixel_features import pixel_features

Classes = dict[int, Tensor]  # the predicted classes at the sampled pixels of each image, by its index

_PIXELS = 2**18
_FEWEST_PER_IMAGE = 16
_FOLDS = 8


def joined(classes: Classes) -> Classes:
    """The classes of all ranks."""
    return {index: found for share in gather(classes) for index, found in share.items()}


class PixelSample:
    """Random pixels of the target images that this rank predicts, always the same ones.

    Args:
        length: The number of images; together they have about 2^18 pixels.
    """

    def __init__(self, length: int) -> None:
        self._per_image = max(_FEWEST_PER_IMAGE, _PIXELS // length)
        self._features: dict[int, Tensor] = {}
        self._cases: dict[int, str] = {}
        self._opinion = torch.empty(0)  # on rank 0
        self._has_opinion = False

    def look(self, indices: Sequence[int], cases: Sequence[str], images: Tensor, labels: Tensor) -> Classes:
        """The classes at the pixels of images (B, C, *S) with label maps (B, *S)."""
        places = torch.stack([self._places(index, images[0, 0].numel()) for index in indices])
        if not self._has_opinion and not self._features.keys() >= set(indices):
            features = pixel_features(images, places.to(images.device)).cpu()
            # Copies: a view would be sent to other ranks with the whole batch.
            self._features |= {index: found.clone() for index, found in zip(indices, features, strict=True)}
            self._cases |= dict(zip(indices, cases, strict=True))
        classes = labels.flatten(1).gather(1, places.to(labels.device)).short().cpu()
        return {index: found.clone() for index, found in zip(indices, classes, strict=True)}

    def gains(self, before: Classes, after: Classes, num_classes: int) -> list[float]:
        """`estimate_gain` of each foreground class, from classes `before` of all ranks and `after` of this one.

        The second opinion comes from `before`, when this is first called. All ranks call it.
        """
        if not self._has_opinion:
            shares = gather((self._features, self._cases))
            with all_or_none("Learning a second opinion"):
                self._opinion = self._opinion if rank() > 0 else _opinion(shares, before, num_classes)
            self._has_opinion, self._features = True, {}
        second, gains = joined(after), None
        with all_or_none("Estimating the gain"):
            if rank() == 0:
                order = sorted(second)
                classes = [torch.cat([of[index] for index in order]) for of in (before, second)]
                gains = estimate_gain(self._opinion, *classes).tolist()
        found: list[float] = broadcast(gains)
        return found

    def _places(self, index: int, pixels: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(index))
        return torch.randint(pixels, (min(pixels, self._per_image),), generator=generator)


def _opinion(shares: Sequence[tuple[dict[int, Tensor], dict[int, str]]], labels: Classes, num_classes: int) -> Tensor:
    """The second opinion on the pixels of all images, in the order of their indices, from all ranks' shares."""
    features = {index: found for of_rank, _ in shares for index, found in of_rank.items()}
    cases = {index: case for _, of_rank in shares for index, case in of_rank.items()}
    order = sorted(features)
    named = [cases[index] or str(index) for index in order]  # without a known case, an image is its own
    sizes = torch.tensor([len(features[index]) for index in order])
    positions = _slice_positions(named).repeat_interleave(sizes)[:, None]
    inputs = torch.cat([torch.cat([features[index] for index in order]), positions], dim=1)
    first = torch.cat([labels[index] for index in order])
    return second_opinion(inputs, _folds([cases[index] for index in order], sizes), first, num_classes)


def _slice_positions(cases: Sequence[str]) -> Tensor:
    """The position of each image among those of its case, from -1 to 1: that of a slice in the body."""
    sizes, passed = Counter(cases), Counter[str]()
    found = []
    for case in cases:
        found.append(2 * passed[case] / max(1, sizes[case] - 1) - 1)
        passed[case] += 1
    return torch.tensor(found)


def _folds(cases: Sequence[str], sizes: Tensor) -> Tensor:
    """Eighths of the pixels of images, patient after patient: slices of one are alike, and mostly in one fold.

    With one patient, or without known ones, every eighth pixel: an organ may lie in a few slices.
    """
    pixels = torch.arange(int(sizes.sum()))
    if len(set(cases)) == 1 or not all(cases):
        return pixels % _FOLDS
    numbers = {case: number for number, case in enumerate(dict.fromkeys(cases))}
    by_case = torch.tensor([numbers[case] for case in cases]).repeat_interleave(sizes).argsort(stable=True)
    return torch.empty_like(pixels).scatter(0, by_case, _FOLDS * pixels // len(pixels))

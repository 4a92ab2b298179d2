"""Prediction of mirrored patches, as nnU-Net does it."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from apl_lightning.heads import Inferer


class Mirrored:
    """An inferer that averages the logits of each patch over all its mirror images.

    Args:
        inferer: Cuts images into patches, as MONAI's `SlidingWindowInferer`.
        axes: The spatial axes to mirror, from 0.

    Examples:
        >>> import torch
        >>> from apl_lightning.nnunet.mirroring import Mirrored
        >>> mirrored = Mirrored(lambda images, network: network(images), axes=(0,))
        >>> (logits,) = mirrored(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), lambda x: (x.cumsum(dim=2),))
        >>> logits.flatten().tolist()
        [1.0, 2.5, 2.0, 3.5]
    """

    def __init__(self, inferer: Inferer, axes: Sequence[int]) -> None:
        self.inferer = inferer
        dimensions = [axis + 2 for axis in axes]
        self._flips = [flip for count in range(len(axes) + 1) for flip in combinations(dimensions, count)]

    def __call__(self, images: Tensor, network: Callable[[Tensor], Sequence[Tensor]]) -> Any:
        """The logits of all heads, each (B, classes, *S)."""

        def average(patches: Tensor) -> tuple[Tensor, ...]:
            runs = [[logits.flip(flip) for logits in network(patches.flip(flip))] for flip in self._flips]
            return tuple(torch.stack(logits).mean(dim=0) for logits in zip(*runs, strict=True))

        return self.inferer(images, average)

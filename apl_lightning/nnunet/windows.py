"""Prediction of whole images by the windows of nnU-Net."""

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor


class Windows:
    """Runs a network on half overlapping windows, with nnU-Net's own positions, padding and Gaussian weights.

    MONAI's `SlidingWindowInferer` bounds the weights below by 0.001, so that two windows count alike at the border of
    an image, and puts the last window closer to the one before it. So its labels would differ from those of nnU-Net.

    Args:
        size: The spatial size of a window, (*S).
        mirrored_axes: Average the logits of each window over its mirror images along these spatial axes.
    """

    def __init__(self, size: Sequence[int], mirrored_axes: Sequence[int] = ()) -> None:
        self.size = tuple(size)
        axes = [axis + 2 for axis in mirrored_axes]
        self._flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]

    def __call__(self, images: Tensor, network: Callable[[Tensor], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """The logits of all heads for images (B, C, *S), each (B, classes, *S).

        They are put together on the CPU if the GPU has no memory for those of the whole images.
        """
        try:
            return self._run(images, network, images.device)
        except torch.OutOfMemoryError:
            pass
        # Not in the `except` block: there the error would keep the tensors of the first attempt.
        return self._run(images, network, torch.device("cpu"))

    def _run(
        self, images: Tensor, network: Callable[[Tensor], Sequence[Tensor]], device: torch.device
    ) -> tuple[Tensor, ...]:
        from acvl_utils.cropping_and_padding.padding import pad_nd_image
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

        padded, inside = pad_nd_image(images, self.size, return_slicer=True)
        size = padded.shape[2:]
        weight = compute_gaussian(self.size, value_scaling_factor=10, device=device).float()
        weights = torch.zeros(size, device=device)
        sums: list[Tensor] = []
        for start in product(*compute_steps_for_sliding_window(size, self.size, 0.5)):
            window: Any = (..., *(slice(first, first + n) for first, n in zip(start, self.size, strict=True)))
            logits = self._mirrored(network, padded[window])
            sums = sums or [torch.zeros(*head.shape[:2], *size, device=device) for head in logits]
            for total, head in zip(sums, logits, strict=True):
                total[window] += head.to(device) * weight
            weights[window] += weight
        return tuple(total.div_(weights)[(..., *inside[2:])] for total in sums)

    def _mirrored(self, network: Callable[[Tensor], Sequence[Tensor]], patches: Tensor) -> list[Tensor]:
        runs = [[head.flip(flip) for head in network(patches.flip(flip))] for flip in self._flips]
        return [torch.stack(heads).mean(dim=0) for heads in zip(*runs, strict=True)]

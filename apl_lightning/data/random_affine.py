"""The default joint transform."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RandomAffine:
    """Rotate, scale and shift image, pseudo label and weight together, in 2D or 3D.

    Labels are made on the unmoved image, so a moved image gives the network something new to learn. Most of the gain
    depends on it (see the ablation in the documentation). Pixels from outside the image get weight 0. All randomness
    is torch's.

    A moved pixel takes the values of its nearest neighbour, in the image as in the label: interpolation smooths the
    image, and a network that learns sharp labels on smoothed images loses thin structures round by round.

    In 3D an image turns only in the planes of two axes of which one is at most three times as long as the other:
    volumes or patches of few slices stay in the plane of these, as in nnU-Net.

    Args:
        degrees: Largest rotation, in degrees (in 3D in each plane).
        scale: Largest relative change of size.
        shift: Largest shift, relative to the size of the image.

    Examples:
        >>> import torch
        >>> from apl_lightning import RandomAffine
        >>> sample = {"image": torch.rand(1, 8, 8), "pseudo_label": torch.ones(1, 8, 8), "weight": torch.ones(1, 8, 8)}
        >>> {key: tuple(value.shape) for key, value in RandomAffine()(sample).items()}
        {'image': (1, 8, 8), 'pseudo_label': (1, 8, 8), 'weight': (1, 8, 8)}
    """

    degrees: float = 15.0
    scale: float = 0.15
    shift: float = 0.05

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """Move `image` (C, *S), `pseudo_label` (1, *S) and `weight` (1, *S)."""
        image: Tensor = sample["image"]
        size = image.shape[1:]
        grid = F.affine_grid(self._draw(size)[None], [1, 1, *size], align_corners=False).to(image)

        def move(values: Tensor, padding: str) -> Tensor:
            moved = F.grid_sample(values[None].to(grid.dtype), grid, "nearest", padding, align_corners=False)
            return moved[0].to(values.dtype)

        return {
            "image": move(image, "border"),
            "pseudo_label": move(sample["pseudo_label"], "border"),
            "weight": move(sample["weight"], "zeros"),
        }

    def _draw(self, size: torch.Size) -> Tensor:
        """A random map from output to input coordinates, for `affine_grid`: (D, D + 1)."""
        dimensions, lengths = len(size), size[::-1]  # the axes of the grid are those of the image in reverse
        matrix = torch.eye(dimensions) * (1 + _uniform(self.scale))
        for first in range(dimensions):
            for second in range(first + 1, dimensions):
                angle = math.radians(float(_uniform(self.degrees)))
                if dimensions > 2 and _is_thin(lengths[first], lengths[second]):
                    continue
                rotation = torch.eye(dimensions)
                rotation[first, first] = rotation[second, second] = math.cos(angle)
                rotation[first, second], rotation[second, first] = -math.sin(angle), math.sin(angle)
                matrix = matrix @ rotation
        # Each axis of the grid is from -1 to 1; a rotation is one in pixels only.
        extent = torch.tensor(lengths, dtype=torch.float)
        matrix = matrix * extent[None, :] / extent[:, None]
        shift = torch.stack([2 * _uniform(self.shift) for _ in size])
        return torch.cat([matrix, shift[:, None]], dim=1)


def _is_thin(first: int, second: int) -> bool:
    """Whether a rotation in the plane of two axes with these lengths would move much out of the image."""
    return max(first, second) > 3 * min(first, second)


def _uniform(largest: float) -> Tensor:
    return (torch.rand(()) * 2 - 1) * largest

"""Patches of large images: random ones for training, and the sliding window over whole images for everything else."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from apl_lightning._support.packages import package
from apl_lightning.data.joint_transforms import TARGET_KEYS

_FOREGROUND = "foreground"


class RandomPatches:
    """Draw patches of image, pseudo label and weight, in 2D or 3D.

    One patch in three has a foreground pixel of the pseudo label at its centre, where it fits in. Where an image is
    smaller, the weight is padded with 0. It needs MONAI (extra `monai`).

    Args:
        size: The spatial size of a patch, (*S).
        count: Patches per image.
        padding: A smaller image is padded with its border (`"edge"`), as `sliding_window` does, or with 0
            (`"constant"`).

    Raises:
        ValueError: If a size or `count` is below 1.

    Examples:
        >>> import torch
        >>> from apl_lightning.data import RandomPatches
        >>> sample = {"image": torch.rand(1, 9, 9), "pseudo_label": torch.ones(1, 9, 9), "weight": torch.ones(1, 9, 9)}
        >>> [tuple(patch["image"].shape) for patch in RandomPatches((4, 12), count=2)(sample)]
        [(1, 4, 12), (1, 4, 12)]
    """

    def __init__(self, size: Sequence[int], count: int = 1, padding: Literal["edge", "constant"] = "edge") -> None:
        if not isinstance(size, Sequence) or not size or min(size) < 1 or count < 1:
            raise ValueError(
                "Expected a number of at least 1 for each axis of a patch, such as (96, 96, 96), and at least 1 patch "
                f"per volume, but got {size} and {count}."
            )
        transforms = _monai("transforms")
        keys = (*TARGET_KEYS, _FOREGROUND)
        self.size = tuple(size)
        self._pad = transforms.SpatialPadd(keys, size, mode=[padding, "constant", "constant", "constant"])
        self._crop = transforms.RandCropByPosNegLabeld(keys, _FOREGROUND, size, pos=1, neg=2, num_samples=count)

    def __call__(self, sample: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Patches of `image` (C, *S), `pseudo_label` (1 or C, *S) and `weight` (1, *S)."""
        if len(self.size) != sample["weight"].ndim - 1:
            raise ValueError(
                f"Expected a `patch_size` with {sample['weight'].ndim - 1} numbers, as an image has shape (C, *S) = "
                f"{tuple(sample['image'].shape)}, but got {self.size}."
            )
        label = sample["pseudo_label"]
        classes = label.max(dim=0, keepdim=True).indices if len(label) > 1 else label
        with warnings.catch_warnings():  # an image without foreground is nothing to warn of
            warnings.filterwarnings("ignore", "Num foregrounds")
            patches = self._crop(self._pad({**sample, _FOREGROUND: (classes > 0).float()}))
        return [{key: patch[key].as_tensor() for key in TARGET_KEYS} for patch in patches]

    def set_random_state(self, seed: int) -> None:
        """Seed the draws."""
        self._crop.set_random_state(seed=seed)

    def patches_of(self, images: Tensor) -> Tensor:
        """Patches of each image (B, C, *S), without labels: (B * count, C, *size)."""
        weight = torch.zeros(1, *images.shape[2:], device=images.device)
        samples = [{"image": image, "pseudo_label": weight, "weight": weight} for image in images]
        return torch.stack([patch["image"] for sample in samples for patch in self(sample)])


def sliding_window(patch_size: Sequence[int]) -> Any:
    """MONAI's `SlidingWindowInferer` for a network that takes patches: half overlapping windows, Gaussian weights.

    A smaller image is padded with its border, as in `RandomPatches`.

    Examples:
        >>> import torch
        >>> from apl_lightning.data import sliding_window
        >>> sliding_window((4, 4))(torch.ones(1, 1, 9, 9), lambda patches: 2 * patches).unique()
        tensor([2.])
    """
    at_once = 4 if len(patch_size) <= 2 else 1
    options = {"overlap": 0.5, "mode": "gaussian", "padding_mode": "replicate"}
    return _monai("inferers").SlidingWindowInferer(tuple(patch_size), at_once, **options)


def _monai(name: str) -> Any:
    return package(f"monai.{name}", "monai", "`patch_size` needs MONAI")

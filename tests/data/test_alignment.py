"""Joint transforms pass the check on test patterns; transforms that move the image alone are found."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from monai import transforms as mt

from apl_lightning import RandomAffine
from apl_lightning.data.alignment import check_alignment
from apl_lightning.data.joint_transforms import TARGET_KEYS

MODES = ("bilinear", "nearest", "nearest")
IMAGE = ["image"]


class Lock:
    """A transform that cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            return sample


def unseeded(sample: dict[str, Any]) -> dict[str, Any]:
    """A transform with random numbers that no seed reaches."""
    flipped = np.random.default_rng().random() < 0.5
    return {key: value.flip(1) if flipped else value for key, value in sample.items()}


JOINT = {
    "affine": RandomAffine(),
    "monai affine": mt.RandAffined(TARGET_KEYS, prob=1, rotate_range=0.5, scale_range=[0.2] * 2, mode=MODES),
    "zoom": mt.RandZoomd(TARGET_KEYS, prob=1, min_zoom=0.7, max_zoom=1.4, mode=MODES),
    "elastic": mt.Rand2DElasticd(TARGET_KEYS, (10, 10), (1, 3), prob=1, mode=MODES, padding_mode="border"),
    "flip": mt.RandFlipd(TARGET_KEYS, prob=0.5),
    "rot90": mt.RandRotate90d(TARGET_KEYS, prob=0.5),
    "crop by class": mt.RandCropByLabelClassesd(
        TARGET_KEYS, label_key="pseudo_label", spatial_size=[16, 16], num_classes=5, num_samples=2, warn=False
    ),
    "resize": mt.Resized(TARGET_KEYS, (24, 24), mode=MODES),
    "pad": mt.SpatialPadd(TARGET_KEYS, (72, 72)),
    "noise": mt.RandGaussianNoised(IMAGE, prob=1, std=1.0),
    "gamma": mt.RandAdjustContrastd(IMAGE, prob=1, gamma=(0.3, 4)),
    "smooth": mt.RandGaussianSmoothd(IMAGE, prob=1, sigma_x=(0.5, 2), sigma_y=(0.5, 2)),
    "bias field": mt.RandBiasFieldd(IMAGE, prob=1),
    "low resolution": mt.RandSimulateLowResolutiond(IMAGE, prob=1, zoom_range=(0.5, 1), upsample_mode="bicubic"),
    "dropout": mt.RandCoarseDropoutd(IMAGE, prob=1, holes=5, spatial_size=(6, 6)),
    "window": mt.ScaleIntensityRanged(IMAGE, a_min=0.2, a_max=0.8, b_min=0, b_max=1, clip=True),
    "inverted": lambda sample: {**sample, "image": 1 - sample["image"]},
    "constant": lambda sample: {**sample, "image": torch.zeros_like(sample["image"])},
    "lock": Lock(),
    "unseeded": unseeded,
}


@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
@pytest.mark.parametrize("name", JOINT)
def test_joint_and_intensity_transforms_are_accepted(name: str, size: tuple[int, ...]) -> None:
    check_alignment(JOINT[name], torch.rand(1, *size))


SMOOTH = {"sigma_x": (3, 4), "sigma_y": (3, 4), "sigma_z": (0, 0)}
THIN = {
    "strong blur": mt.RandGaussianSmoothd(IMAGE, prob=0.2, **SMOOTH),
    "turned slices": mt.RandAffined(TARGET_KEYS, prob=1, rotate_range=[0, 0, 0.5], mode=("bilinear", *MODES[1:])),
    "now and then destroyed": mt.RandKSpaceSpikeNoised(IMAGE, prob=0.05),
}


@pytest.mark.parametrize("size", [(64, 64, 2), (96, 96, 3), (48, 48, 48)])
@pytest.mark.parametrize("name", THIN)
def test_volumes_of_few_slices(name: str, size: tuple[int, ...]) -> None:
    check_alignment(THIN[name], torch.rand(1, *size))


def test_a_transform_that_changes_weights_is_named() -> None:
    with pytest.raises(ValueError, match="let it keep the values of 'weight'"):
        check_alignment(lambda sample: {**sample, "weight": sample["weight"] / 2}, torch.rand(1, 64, 64))


NOISE = [mt.RandGaussianNoised(IMAGE, prob=1, std=0.3), mt.RandGaussianSmoothd(IMAGE, prob=1)]
ALONE = {
    "rotation": mt.RandRotated(IMAGE, prob=1, range_x=0.26),
    "small rotation": mt.RandRotated(IMAGE, prob=1, range_x=0.0873),
    "rare rotation": mt.RandRotated(IMAGE, prob=0.1, range_x=0.26),
    "zoom": mt.RandZoomd(IMAGE, prob=1, min_zoom=0.9, max_zoom=1.1),
    "rare zoom": mt.RandZoomd(IMAGE, prob=0.1, min_zoom=0.8, max_zoom=1.2),
    "shift": mt.RandAffined(IMAGE, prob=1, translate_range=[4, 4]),
    "elastic": mt.Rand2DElasticd(IMAGE, (20, 20), (1, 2), prob=1),
    "flip": mt.RandFlipd(IMAGE, prob=0.5),
    "rare flip": mt.RandFlipd(IMAGE, prob=0.1, spatial_axis=1),
    "rot90": mt.RandRotate90d(IMAGE, prob=0.5),
    "transpose": lambda sample: {**sample, "image": sample["image"].mT},
    "rotation with noise": mt.Compose([mt.RandRotated(IMAGE, prob=1, range_x=0.26), *NOISE]),
    "no label": mt.RandRotated(["image", "weight"], prob=1, range_x=0.26),
    "no weight": mt.RandFlipd(["image", "pseudo_label"], prob=0.5),
    "no image": mt.RandFlipd(["pseudo_label", "weight"], prob=0.5),
}


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (256, 256)])
@pytest.mark.parametrize("name", ALONE)
def test_transforms_that_separate_them_are_an_error(name: str, size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="together, but on test patterns the .* (pixels away from the weight|is lost)"):
        check_alignment(ALONE[name], torch.rand(1, *size))


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("size", [(16, 16), (64, 48), (24, 24, 24), (200, 8, 200), (1, 32, 32)])
def test_flip_of_the_image_alone_is_an_error(size: tuple[int, ...], axes: tuple[int, ...]) -> None:
    image = torch.rand(2, *size) * 4000 - 1000  # two channels, in Hounsfield units
    if any(size[axis - 1] >= 16 for axis in axes):
        with pytest.raises(ValueError, match="move image, pseudo label and weight together"):
            check_alignment(lambda sample: {**sample, "image": sample["image"].flip(axes)}, image)
    check_alignment(lambda sample: {key: value.flip(axes) for key, value in sample.items()}, image)


def test_a_constant_image_of_one_pixel_has_nothing_to_check() -> None:
    check_alignment(lambda sample: sample, torch.zeros(1, 1, 1))

"""Target images with their pseudo labels; errors for unsuitable data sets and transforms."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Images
from monai.data import MetaTensor
from monai.transforms import RandAffined, RandFlipd, RandSpatialCropSamplesd
from torch.utils.data import Dataset, IterableDataset, Subset

from apl_lightning import RandomAffine, TargetDataset
from apl_lightning._support.seeding import run_seed
from apl_lightning.data import EpochSampler, Keys, RandomPatches, fingerprint
from apl_lightning.data.joint_transforms import TARGET_KEYS
from apl_lightning.data.unopened import unopened_copy


def filled(dataset: Any, directory: Path, **options: Any) -> TargetDataset:
    """A target data set with a round 0, in which the label is 1 where the image is bright."""
    target = TargetDataset(dataset, directory, **options)
    target.store.start(0)
    with target.store.write(0, 2) as writer:
        for index in range(len(target)):
            image = target.read(index)["image"][0]
            writer.add(index, (image > 0.5).long(), (image > 0.5).float(), fingerprint=fingerprint(image[None]))
    target.store.join(0)
    target.store.publish(0)
    return target


def test_sample_without_transform(tmp_path: Path, images: Images) -> None:
    sample = filled(images, tmp_path)[2]
    assert torch.equal(sample["image"], images[2])
    assert torch.equal(sample["pseudo_label"], (images[2][0] > 0.5).long())
    assert torch.equal(sample["weight"], (images[2][0] > 0.5).float())
    assert (sample["index"], sample["round"]) == (2, 0)


@pytest.mark.parametrize(
    "form",
    [
        lambda image, label: image,
        lambda image, label: (image, label),
        lambda image, label: {"scan": image, "mask": label, "name": "x"},
        lambda image, label: {"scan": MetaTensor(image)},
        lambda image, label: image.numpy(),
    ],
)
def test_forms_of_samples(tmp_path: Path, form: Callable[..., Any]) -> None:
    labelled = Images(labelled=True)
    samples = [form(*labelled[index]) for index in range(3)]
    target = filled(samples, tmp_path, keys=Keys("scan", "mask"))
    assert type(target[1]["image"]) is torch.Tensor
    assert torch.equal(target[1]["image"], labelled[1][0])
    assert "label" not in target[1], "a reference label never reaches training"
    assert "mask" not in target[1]


def test_subset_keeps_its_own_indices(tmp_path: Path, images: Images) -> None:
    target = filled(Subset(images, [4, 1]), tmp_path)
    assert len(target) == 2
    assert torch.equal(target[0]["image"], images[4])


def test_joint_transform_moves_all_three(tmp_path: Path) -> None:
    flip = RandAffined(
        keys=TARGET_KEYS, prob=1, rotate_range=1.0, mode=["nearest", "nearest", "nearest"], padding_mode="zeros"
    )
    for sample in (filled(Images(size=(24, 24)), tmp_path, transform=flip)[index] for index in range(6)):
        bright = sample["image"][0] > 0.5
        assert torch.equal(sample["pseudo_label"], bright.long())
        assert torch.equal(sample["weight"], bright.float())


def test_volumes_of_different_size_and_patches(tmp_path: Path) -> None:
    volumes = [torch.rand(1, *size) for size in ((12, 10, 8), (9, 14, 11))]
    crop = RandSpatialCropSamplesd(keys=TARGET_KEYS, roi_size=(8, 8, 8), num_samples=3, random_size=False)
    target = filled(volumes, tmp_path, transform=crop)
    patches = target[1]
    assert len(patches) == 3
    for patch in patches:
        assert patch["image"].shape == (1, 8, 8, 8)
        assert torch.equal(patch["pseudo_label"], (patch["image"][0] > 0.5).long())
    assert filled(volumes, tmp_path / "whole")[1]["pseudo_label"].shape == (9, 14, 11)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (RandFlipd(keys=["image"], prob=0.5, spatial_axis=1), "move image, pseudo label and weight together"),
        (lambda s: {**s, "image": s["image"].rot90(1, (1, 2))}, "move image, pseudo label and weight together"),
        (lambda s: {**s, "image": s["image"][:, 2:]}, r"keep .* alike, but got shapes \(1, 14, 16\), \(1, 16, 16\)"),
        (lambda s: {"image": s["image"]}, "return a dictionary with .*'pseudo_label'"),
        (lambda s: {**s, "pseudo_label": s["pseudo_label"] * 0.4}, "mode='nearest' for 'pseudo_label'"),
        (lambda s: {**s, "image": s["image"] / 0}, "a finite 'image', but got NaN or infinity: mend the transform"),
        (lambda s: {**s, "weight": s["weight"] / 0}, "a finite 'weight', but got NaN or infinity"),
    ],
)
def test_bad_transforms_are_an_error(tmp_path: Path, images: Images, transform: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetDataset(images, tmp_path, transform=transform)


@pytest.mark.parametrize("patches", [None, RandomPatches((16, 16))])
def test_transforms_in_place_leave_the_data_set_alone(tmp_path: Path, patches: RandomPatches | None) -> None:
    def brighter(sample: dict[str, Any]) -> dict[str, Any]:
        sample["image"].mul_(1.5)
        return sample

    images = [torch.rand(1, 16, 16) for _ in range(2)]
    given = [image.clone() for image in images]
    target = filled(images, tmp_path, transform=brighter, patches=patches)
    assert torch.equal(target[0]["image"], 1.5 * given[0])
    assert all(torch.equal(image, before) for image, before in zip(images, given, strict=True))


def test_checks_keep_random_states(tmp_path: Path, images: Images) -> None:
    transform = RandFlipd(keys=TARGET_KEYS, prob=0.5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), transform.R.get_state()[1].copy()
    TargetDataset(images, tmp_path, transform=transform)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert np.array_equal(transform.R.get_state()[1], states[2])


class Random(Images):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) + torch.rand(())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Images())


class Broken(Images):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) / (0 if index == 0 else 1)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Random(), ValueError, "sample 0 differs when read twice.*pass them as `transform`"),
        ([], ValueError, "at least one sample, but the data set is empty"),
        (Stream(), TypeError, "map-style data set.*wrap the data set, not its loader"),
        (Broken(), ValueError, "finite values in the image of sample 0"),
        ([np.zeros((1, 4, 4), np.uint8)], TypeError, r"image of sample 0 to be a floating point .*uint8"),
        ([{"scan": torch.rand(1, 4, 4)}], TypeError, r"the key 'image', but got the keys \['scan'\]: pass `image_key`"),
        ([(torch.rand(1, 4, 4), torch.zeros(5, 5))], ValueError, r"label of sample 0 to have shape \(4, 4\)"),
        (["scan.png"], TypeError, "Expected sample 0 to be a tensor.* but got str"),
    ],
)
def test_bad_data_sets_are_an_error(
    tmp_path: Path, dataset: Dataset[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TargetDataset(dataset, tmp_path)


def test_a_label_is_refused_for_another_image(tmp_path: Path, images: Images) -> None:
    filled(images, tmp_path)
    for swapped in (Subset(images, [1, 0, 2, 3, 4, 5]), [image.flip(-1) for image in images], [*images[:5], images[0]]):
        target = TargetDataset(swapped, tmp_path)
        with pytest.raises(ValueError, match="Expected sample . to be the image that its pseudo label was made on"):
            [target[index] for index in range(6)]
    rounded = TargetDataset([image + 1e-7 for image in images], tmp_path)  # another processor rounds differently
    assert len([rounded[index] for index in range(6)]) == 6


def test_runs_of_two_seeds_differ(tmp_path: Path) -> None:
    orders = [[drawn.index for drawn in EpochSampler(range(20), 1, 0, seed, lambda: 0)] for seed in (0, 1)]
    moved = [filled(Images(), tmp_path / str(n), transform=RandomAffine(), seed=n)[0]["image"] for n in (0, 1)]
    seeds = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        seeds.append(run_seed())
    assert orders[0] != orders[1]
    assert not torch.equal(*moved)
    assert seeds[0] != seeds[1]


class Archive(Dataset[torch.Tensor]):
    """Opens its file with the first sample that it reads, as data sets of archives do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def __len__(self) -> int:
        return 6

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()

    def __getitem__(self, index: int) -> torch.Tensor:
        self.file = self.file or self.path.open("rb")
        self.file.seek(64 * 4 * index)
        return torch.frombuffer(bytearray(self.file.read(64 * 4)), dtype=torch.float32).view(1, 8, 8)


def test_files_stay_closed_in_a_process_with_workers(tmp_path: Path) -> None:
    """Forked workers would share the position in a file that is open."""
    values = torch.rand(6, 64)
    (tmp_path / "images.bin").write_bytes(values.numpy().tobytes())
    archive = Archive(tmp_path / "images.bin")
    target = TargetDataset(Subset(archive, range(6)), tmp_path / "labels", has_workers=True)
    assert torch.equal(target.read(3)["image"].flatten(), values[3])
    assert archive.file is None
    again = pickle.loads(pickle.dumps(target))
    assert again.dataset.dataset.file is None
    assert torch.equal(again.read(3)["image"].flatten(), values[3])
    assert torch.equal(TargetDataset(archive, tmp_path / "alone").read(3)["image"].flatten(), values[3])
    assert archive.file is not None


def test_a_copy_shares_arrays(tmp_path: Path) -> None:
    images = [torch.rand(1, 8, 8) for _ in range(4)]
    target = TargetDataset(images, tmp_path, has_workers=True)
    assert target.read(2)["image"].data_ptr() == images[2].data_ptr()
    without_copy = [lambda: images[0]]
    assert unopened_copy(without_copy) is without_copy

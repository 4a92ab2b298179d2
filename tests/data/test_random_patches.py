"""Patches of volumes for training, and whole volumes for everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from monai.data import CacheDataset
from monai.inferers import SlidingWindowInferer
from monai.transforms import RandFlipd
from torch import nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule, TargetDataset
from apl_lightning.data import DrawnSample, EpochSampler, RandomPatches, sliding_window
from apl_lightning.data.joint_transforms import TARGET_KEYS

Make = Callable[..., pl.Trainer]
SIZES = [(10, 12, 9), (8, 8, 8), (5, 14, 8)]  # one is smaller than a patch along an axis
PATCH = (8, 8, 8)


def volume(size: tuple[int, ...]) -> torch.Tensor:
    """Each voxel has a value of its own, so a patch shows where it comes from."""
    return torch.arange(np.prod(size), dtype=torch.float).view(1, *size)


def network() -> nn.Module:
    layers = [nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.ReLU(), nn.Conv3d(8, 3, 1)]
    return nn.Sequential(*layers)


def sample(size: tuple[int, ...]) -> dict[str, torch.Tensor]:
    image = volume(size)
    return {"image": image, "pseudo_label": image.long() % 3, "weight": 0.5 + 0.5 * image / image.numel()}


def test_patches_keep_image_label_and_weight_together() -> None:
    given = sample((10, 12, 9))
    for patch in RandomPatches(PATCH, count=5)(given):
        image = patch["image"].long().flatten()
        assert patch["image"].shape == (1, *PATCH)
        for key in ("pseudo_label", "weight"):
            assert torch.equal(patch[key].flatten(), given[key].flatten()[image])


def test_small_volumes_are_padded_and_padding_counts_nothing() -> None:
    given = sample((5, 14, 8))
    (patch,) = RandomPatches(PATCH)(given)
    inside = patch["weight"][0] > 0
    assert patch["image"].shape == (1, *PATCH)
    assert inside.sum() == 5 * 8 * 8
    assert set(patch["image"].flatten().tolist()) <= set(given["image"].flatten().tolist())  # its border, not zeros


def test_a_third_of_the_patches_has_foreground_at_its_centre() -> None:
    image = volume((1, 64, 64))
    label = torch.zeros(1, 64, 64)
    label[0, 30, 41] = 1
    given = {"image": image[0], "pseudo_label": label, "weight": torch.ones(1, 64, 64)}
    patches = RandomPatches((9, 9), count=300)
    patches.set_random_state(0)
    centred = sum(int(patch["pseudo_label"][0, 4, 4]) for patch in patches(given))
    by_chance = 200 / 56**2
    assert abs(centred - 100 - by_chance) < 3 * (300 * 2 / 9) ** 0.5


def test_soft_labels_have_foreground_too() -> None:
    soft = torch.full((3, 16, 16), 0.1)
    soft[0] = 0.8
    soft[:, 8, 8] = torch.tensor([0.1, 0.1, 0.8])
    given = {"image": torch.zeros(1, 16, 16), "pseudo_label": soft, "weight": torch.ones(1, 16, 16)}
    patches = RandomPatches((5, 5), count=60)
    patches.set_random_state(0)
    found = [patch["pseudo_label"] for patch in patches(given)]
    assert all(label.shape == (3, 5, 5) for label in found)
    assert 10 <= sum(bool(label[2, 2, 2] == 0.8) for label in found) <= 40


def test_passes_follow_each_other_without_regard_to_epochs() -> None:
    ranks = [EpochSampler(range(5), 2, rank, seed=3, done=lambda: 0, samples=4) for rank in (0, 1)]
    drawn = []
    for epoch in range(5):  # 20 samples: four passes
        for sampler in ranks:
            sampler.set_epoch(epoch)
        assert [len(sampler) for sampler in ranks] == [2, 2]
        for pair in zip(*ranks, strict=True):
            drawn += pair
    assert [each.turn for each in drawn] == [turn for turn in range(4) for _ in range(5)]
    for turn in range(4):
        assert sorted(each.index for each in drawn if each.turn == turn) == [0, 1, 2, 3, 4]
    assert not any(each.repeated for each in drawn)


def test_a_resumed_epoch_continues_where_it_stopped() -> None:
    whole = EpochSampler(range(5), 1, 0, seed=3, done=lambda: 0, samples=12)
    rest = EpochSampler(range(5), 1, 0, seed=3, done=lambda: 7, samples=12)
    assert list(whole)[7:] == list(rest)


@pytest.mark.parametrize(("workers", "aux"), [(0, "fresh"), (1, "auto")])
def test_volumes_are_refined_on_patches(tmp_path: Path, trainer: Make, workers: int, aux: str) -> None:
    """Volumes of different sizes in a cache data set; labels and Dice of whole volumes by one sliding window."""
    torch.manual_seed(0)
    volumes = [{"image": torch.rand(1, *size), "label": torch.randint(0, 3, size)} for size in SIZES]
    data = TargetDataModule(
        CacheDataset(volumes, progress=False),
        volumes,
        batch_size=2,
        num_workers=workers,
        patch_size=PATCH,
        patches_per_volume=3,
        steps_per_epoch=4,
        store_dir=tmp_path,
    )
    module = APLModule(network(), 3, aux=aux)
    seen: Counter[tuple[int, ...]] = Counter()

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen[tuple(batch["image"].shape)] += 1

    callback = PseudoLabelCallback(guard="off")
    trainer(max_epochs=2, callbacks=[callback, Count()]).fit(module, data)
    assert seen == {(6, 1, *PATCH): 8}
    store = data.train_dataset.store
    assert [tuple(store.read(index).classes.shape) for index in range(3)] == SIZES
    assert isinstance(module.inferer, SlidingWindowInferer)
    assert module.inferer.roi_size == PATCH


def test_small_images_are_padded_alike_everywhere() -> None:
    """The window of a label and the patch of a training step continue the border of an image of air (-1000)."""
    image, seen = torch.full((1, 4, 8), -1000.0), []
    sliding_window((8, 8))(image[None], lambda patches: seen.append(patches.clone()) or patches)
    weight = torch.ones(1, 4, 8)
    (patch,) = RandomPatches((8, 8))({"image": image, "pseudo_label": weight, "weight": weight})
    assert torch.equal(seen[0][0], patch["image"])


def test_labels_equal_a_sliding_window_of_monai(tmp_path: Path, trainer: Make) -> None:
    model = network()
    image = torch.rand(1, 12, 20, 9)
    expected = SlidingWindowInferer(PATCH, overlap=0.5, mode="gaussian")(image[None], model)[0].argmax(dim=0)
    data = TargetDataModule([image], patch_size=PATCH, store_dir=tmp_path)
    main_head = PseudoLabelCallback(lambda p_main, p_aux: p_main.max(dim=1)[::-1], guard="off")
    trainer(callbacks=[main_head]).fit(APLModule(model, 3), data)
    assert torch.equal(data.train_dataset.store.read(0).classes.long(), expected)


def test_patches_need_a_size_for_each_axis(tmp_path: Path) -> None:
    data = TargetDataModule([torch.rand(1, 12, 12)], patch_size=PATCH, store_dir=tmp_path)
    with pytest.raises(ValueError, match=r"Expected a `patch_size` with 2 numbers.*got \(8, 8, 8\)"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (0, 8)}, "at least 1"),
        ({"patch_size": 16}, "a number of at least 1 for each axis"),
        ({"transform": "flip"}, "Expected `transform` to be 'affine'"),
        ({"patch_size": (8, 8), "patches_per_volume": 0}, "at least 1"),
        ({"patches_per_volume": 2}, "Expected `patch_size`"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
    ],
)
def test_bad_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetDataModule([torch.rand(1, 12, 12)], **options)


def test_patch_and_move_are_drawn_independently(tmp_path: Path) -> None:
    """A lone MONAI transform draws from the same generator as the crop: with one seed both would do the same."""
    image, label = torch.zeros(1, 40, 40), torch.zeros(40, 40, dtype=torch.long)
    label[20, 20] = 1
    dataset = TargetDataset(
        [image], tmp_path, RandFlipd(TARGET_KEYS, prob=0.3, spatial_axis=1), patches=RandomPatches((4, 4))
    )
    dataset.store.start(0)
    with dataset.store.write(0, num_classes=2) as writer:
        writer.add(0, label, torch.linspace(0.1, 0.9, 40).expand(40, 40), "", torch.empty(0))
    dataset.store.join(0)
    dataset.store.publish(0)
    counts: Counter[tuple[bool, bool]] = Counter()
    for turn in range(300):
        sample = dataset[DrawnSample(0, turn, repeated=False)]
        is_flipped = bool(sample["weight"][0, 0] > sample["weight"][0, -1])
        counts[bool(sample["pseudo_label"].any()), is_flipped] += 1
    background = counts[False, True] / (counts[False, True] + counts[False, False])
    assert 0.2 < background < 0.4


def test_windows_are_those_of_the_present_data(tmp_path: Path, trainer: Make) -> None:
    module = APLModule(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1)), 3)
    for size in ((8, 8), (12, 12)):
        data = TargetDataModule([torch.rand(1, 16, 16)], patch_size=size, store_dir=tmp_path)
        trainer(callbacks=[PseudoLabelCallback(guard="off")]).fit(module, data)
        assert module.inferer.roi_size == size
    trainer(callbacks=[PseudoLabelCallback(guard="off")]).fit(module, TargetDataModule([torch.rand(1, 16, 16)]))
    assert module.inferer is None


def test_another_number_of_steps_is_refused_on_resume(tmp_path: Path, trainer: Make) -> None:
    def fit(steps: int, **options: Any) -> pl.Trainer:
        data = TargetDataModule([torch.rand(1, 8, 8)], steps_per_epoch=steps, store_dir=tmp_path)
        module = APLModule(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1)), 3)
        run = trainer(callbacks=[PseudoLabelCallback(guard="off")], max_epochs=2)
        run.fit(module, data, **options)
        return run

    fit(2).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="`steps_per_epoch` of the interrupted run, 2, but got 3"):
        fit(3, ckpt_path=tmp_path / "run.ckpt")

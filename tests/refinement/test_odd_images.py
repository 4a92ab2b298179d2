"""Images of other types and shapes, other precisions, labels to ignore and networks that take patches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from monai.inferers import SlidingWindowInferer
from torch import Tensor
from torch.nn import functional as F

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule, TargetDataset
from apl_lightning.losses import weighted_cross_entropy
from apl_lightning.metrics import CaseDice, overlap_counts

Make = Callable[..., pl.Trainer]


def fit(make: Make, folder: Path, train: Any, val: Any = None, network: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    own = {name: options.pop(name) for name in ("ignore_index", "inferer", "batch_norm") if name in options}
    module = APLModule(network or TinyNet(), CLASSES, **own)
    data = TargetDataModule(train, val, batch_size=2, store_dir=folder / "labels", transform=None)
    callback = options.pop("callback", PseudoLabelCallback())
    trainer = make(max_epochs=2, callbacks=[callback], default_root_dir=folder, **options)
    trainer.fit(module, data)
    return trainer


def labelled(dtype: torch.dtype) -> Any:
    return [(image.to(dtype), label) for image, label in Images(4, labelled=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_other_float_types(trainer: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    rounded = [(image.to(dtype).float(), label) for image, label in Images(4, labelled=True)]
    ours = fit(trainer, tmp_path, labelled(dtype), labelled(dtype))
    theirs = fit(trainer, tmp_path, rounded, rounded)
    assert float(ours.callback_metrics["val/dice"]) == float(theirs.callback_metrics["val/dice"])
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_float64_in_weights_and_precision(trainer: Make, tmp_path: Path) -> None:
    by_precision = fit(trainer, tmp_path, Images(4), labelled(torch.float32), precision="64-true")
    by_network = fit(trainer, tmp_path, Images(4), labelled(torch.float32), TinyNet().double())
    for ended in (by_precision, by_network):
        assert {p.dtype for p in ended.model.parameters()} == {torch.float64}
        assert 0 <= ended.callback_metrics["val/dice"] <= 1


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_weights_are_refused(trainer: Make, tmp_path: Path, precision: str) -> None:
    with pytest.raises(
        ValueError, match=f"weights in float32, but got precision='{precision}'.*pass precision='bf16-mix"
    ):
        fit(trainer, tmp_path, Images(4), precision=precision)


def test_images_without_a_channel(trainer: Make, tmp_path: Path) -> None:
    flat = [image[0] for image in Images(4)]
    with pytest.raises(
        ValueError, match=r"\(B, C, \*S\) with 4 dimensions, but got \(4, 16, 16\): images need a channel"
    ):
        fit(trainer, tmp_path, flat)
    with pytest.raises(ValueError, match=r"of shape \(C, \*S\) = \(16, 16\).*need a channel dimension"):
        TargetDataset(flat, tmp_path / "labels", transform=lambda sample: {"image": sample["image"].permute(0, 2, 1)})


def test_one_enormous_pixel_is_named(trainer: Make, tmp_path: Path) -> None:
    images = [image.clone() for image in Images(4)]
    images[2][0, 3, 3] = 3e38
    with pytest.raises(
        ValueError, match=r"gave NaN for samples \[.*2.*\].* values from .* to 3e\+38. If those are wrong"
    ):
        fit(trainer, tmp_path, images, batch_norm="adapt")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("images", "Expected a data set of images, but got 'images': pass a data set that reads the files"),
        (Path("images"), "map-style data set .* but got PosixPath"),
        ({0: torch.rand(1, 4, 4)}, "Expected a data set of images, but got {0: tensor"),
        (
            [[{"image": torch.rand(1, 4, 4)}] * 2],
            "sample 0 to be one image, but got a list of 2 dictionaries.*`transform`",
        ),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, dataset: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TargetDataset(dataset, tmp_path)


def with_border(images: Images) -> Any:
    """The outermost pixels have the label 255."""
    samples = []
    for image, label in images:
        bordered = torch.full_like(label, 255)
        bordered[1:-1, 1:-1] = label[1:-1, 1:-1]
        samples.append((image, bordered))
    return samples


def test_ignored_pixels_count_in_no_dice(trainer: Make, tmp_path: Path) -> None:
    samples = with_border(Images(4, labelled=True))
    ended = fit(trainer, tmp_path, samples, samples, ignore_index=255)
    inner, dice = [], CaseDice(CLASSES)
    for image, label in samples:
        with torch.no_grad():
            inner.append(ended.model(image[None]).main.argmax(1)[:, 1:-1, 1:-1])
        dice.update(inner[-1], label[None, 1:-1, 1:-1])
    assert float(ended.callback_metrics["val/dice"]) == pytest.approx(float(dice.compute()[1:].nanmean()), abs=1e-6)
    assert 0 <= ended.callback_metrics["pseudo/dice"] <= 1
    with pytest.raises(ValueError, match="from 0 to 255: check `num_classes`, or pass `ignore_index`"):
        fit(trainer, tmp_path, Images(4), samples)


def test_a_label_of_ignored_pixels_alone() -> None:
    empty = overlap_counts(torch.zeros(4, 4).long(), torch.full((4, 4), 255), CLASSES, ignore_index=255)
    assert empty.tolist() == [[0] * CLASSES] * 3


class OnlyPatches(TinyNet):
    """Refuses whole images, as a transformer does."""

    sizes: set[tuple[int, ...]]

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] != (8, 8):
            raise RuntimeError("size of tensor a must match")
        return super().forward(image)


@pytest.mark.filterwarnings("ignore:guard=.restore.")
def test_one_inferer_serves_labels_validation_test_and_prediction(trainer: Make, tmp_path: Path) -> None:
    module = APLModule(OnlyPatches(), CLASSES, inferer=SlidingWindowInferer((8, 8)), example=torch.rand(2, 1, 8, 8))

    def crop(sample: dict[str, Any]) -> dict[str, Any]:
        return {key: value[:, :8, :8] for key, value in sample.items()}

    samples = labelled(torch.float32)
    data = TargetDataModule(
        samples, samples, batch_size=2, store_dir=tmp_path, transform=crop, test=samples, predict=samples
    )
    ended = trainer(callbacks=[PseudoLabelCallback(guard="restore")])
    ended.fit(module, data)
    assert {"val/dice", "pseudo/dice"} <= set(ended.callback_metrics)
    (tested,) = ended.test(module, data, verbose=False)
    assert 0 <= tested["test/dice"] <= 1
    assert [labels.shape for labels in ended.predict(module, data)] == [(2, 16, 16)] * 2


def test_inferer_of_the_callback_takes_precedence(trainer: Make, tmp_path: Path) -> None:
    calls: list[str] = []

    def recorded(name: str) -> Any:
        def infer(image: Tensor, network: Any) -> Any:
            calls.append(name)
            return network(image)

        return infer

    callback = PseudoLabelCallback(inferer=recorded("callback"), guard="off")
    fit(
        trainer,
        tmp_path,
        Images(4),
        labelled(torch.float32),
        inferer=recorded("module"),
        callback=callback,
        batch_norm="frozen",
    )
    assert calls.count("callback") == 2
    assert "module" in calls


class Counting(Images):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.read: set[int] = set()

    def __getitem__(self, index: int) -> Any:
        self.read.add(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("batches", [1, 2])
def test_fast_dev_run_reads_what_it_trains_on(trainer: Make, tmp_path: Path, batches: int) -> None:
    images = Counting(40)
    ended = fit(trainer, tmp_path, images, fast_dev_run=int(batches))
    assert len(images.read) == 2 * batches
    assert ended.global_step == batches


@pytest.mark.parametrize("shape", [(16, 16), (1, 16, 16)])
def test_a_label_at_another_key_is_not_silent(tmp_path: Path, shape: tuple[int, ...]) -> None:
    samples = [{"image": image, "mask": torch.zeros(shape).long(), "age": torch.tensor(3)} for image in Images(2)]
    with pytest.warns(UserWarning, match="have no 'label', but 'mask' looks like a label.*pass label_key='mask'"):
        TargetDataset(samples, tmp_path)
    TargetDataset([{**sample, "mask": sample["image"]} for sample in samples], tmp_path)


def test_window_without_a_fit(trainer: Any) -> None:
    """`patch_size` of the data module serves test and prediction too."""

    class OnlyPatches(TinyNet):
        def forward(self, image: Tensor) -> Tensor:
            assert image.shape[-2:] == (8, 8)
            return super().forward(image)

    module, images = APLModule(OnlyPatches(), CLASSES, example=torch.rand(2, 1, 8, 8)), Images(2, labelled=True)
    data = TargetDataModule(test=images, predict=images, patch_size=(8, 8))
    assert [labels.shape for labels in trainer().predict(module, data)] == [(1, 16, 16)] * 2
    assert 0 <= trainer().test(module, data, verbose=False)[0]["test/dice"] <= 1


def test_loss_of_coarse_logits() -> None:
    class Coarse(TinyNet):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(F.avg_pool2d(image, 4))

    module = APLModule(Coarse(), CLASSES, consistency_weight=0.0, dice_weight=0.0, batch_norm="frozen")
    image, labels, weights = torch.rand(2, 1, 16, 16), torch.randint(CLASSES, (2, 16, 16)), torch.rand(2, 16, 16)
    fine = [F.interpolate(z, (16, 16), mode="bilinear") for z in module.model(image)]
    expected = torch.stack([weighted_cross_entropy(z, labels, weights) for z in fine]).mean()
    found = module.losses({"image": image, "pseudo_label": labels, "weight": weights})["loss"]
    torch.testing.assert_close(found, expected)

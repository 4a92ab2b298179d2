"""SelfTrainingModule and TentModule; soft labels from the store to the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from monai.transforms import RandFlipd
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apl_lightning import (
    APLModule,
    PseudoLabelCallback,
    RandomAffine,
    SelfTrainingModule,
    TargetDataModule,
    TargetDataset,
    TentModule,
)
from apl_lightning.data.joint_transforms import TARGET_KEYS
from apl_lightning.denoisers import APL, CBST, CRST, DPL, IAST, Predictor, Threshold
from apl_lightning.heads import Logits
from apl_lightning.labels.spool import Spool
from apl_lightning.labels.target_images import ImageBatch
from apl_lightning.losses import balanced_weights, weighted_cross_entropy, weighted_dice_loss
from apl_lightning.refinement.label_loss import label_loss

Make = Callable[..., pl.Trainer]


def batch() -> dict[str, Tensor]:
    return {
        "image": torch.rand(2, 1, 8, 8),
        "pseudo_label": torch.randint(CLASSES, (2, 8, 8)),
        "weight": torch.rand(2, 8, 8),
    }


def test_labels_train_all_parameters() -> None:
    module = SelfTrainingModule(TinyNet(), CLASSES, batch_norm="frozen")
    given = batch()
    main, aux = module(given["image"])
    expected = sum(weighted_cross_entropy(z, given["pseudo_label"], given["weight"]) for z in (main, aux)) / 2
    losses = module.losses(given)
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    [group] = module.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    assert all(p.grad is not None and p.grad.any() for p in module.model.head_parameters())
    assert all(p.grad is not None for p in module.model.encoder_parameters())


@pytest.mark.parametrize("kind", [APLModule, SelfTrainingModule])
def test_loss_of_the_denoiser_replaces_cross_entropy(kind: Any, trainer: Make, tmp_path: Path) -> None:
    module = kind(TinyNet(), CLASSES, dice_weight=0.0, **({"consistency_weight": 0.0} if kind is APLModule else {}))
    given = batch()
    for denoiser, folder in ((IAST(), "labels"), (APL(), "more")):
        data = TargetDataModule(Images(4), store_dir=tmp_path / folder, transform=None)
        trainer(callbacks=[PseudoLabelCallback(denoiser)]).fit(module, data)
        expected = denoiser.loss(*module.model(given["image"]), given["pseudo_label"], given["weight"])
        torch.testing.assert_close(module.losses(given)["loss"], expected)


def test_dice_loss_is_added_to_that_of_the_denoiser() -> None:
    given, options = batch(), {"batch_norm": "frozen"}
    torch.manual_seed(0)
    alone = SelfTrainingModule(TinyNet(), CLASSES, **options)
    torch.manual_seed(0)
    module = SelfTrainingModule(TinyNet(), CLASSES, dice_weight=0.5, **options)
    both = module(given["image"])
    weights = balanced_weights(given["pseudo_label"], given["weight"], CLASSES)
    dice = sum(weighted_dice_loss(z, given["pseudo_label"], weights) for z in both) / 2
    torch.testing.assert_close(module.losses(given)["loss"], alone.losses(given)["loss"] + 0.5 * dice)
    with pytest.raises(ValueError, match="Expected `dice_weight` to be at least 0 and finite, but got -1"):
        SelfTrainingModule(TinyNet(), CLASSES, dice_weight=-1.0)


def soft_label(image: Tensor) -> Tensor:
    """Probabilities of three classes that are linear in the image, so that they show how it moves."""
    return torch.cat([image, 1 - image, torch.zeros_like(image)])


def soft_dataset(folder: Path, **options: Any) -> TargetDataset:
    ramp = (torch.arange(16)[:, None] + 2 * torch.arange(16)) / 45
    images = [ramp[None], 1 - ramp[None]]
    target = TargetDataset(images, folder, **options)
    target.store.start(0)
    with target.store.write(0, CLASSES) as writer:
        for index in range(2):
            writer.add(index, soft_label(images[index]), torch.ones(16, 16))
    target.store.join(0)
    target.store.publish(0)
    return target


def test_soft_labels_are_stored_with_8_bits(tmp_path: Path) -> None:
    target = soft_dataset(tmp_path)
    sample = target[1]
    torch.testing.assert_close(sample["pseudo_label"], soft_label(sample["image"]), atol=0.5 / 255 + 1e-6, rtol=0)
    read = target.store.read(1)
    assert torch.equal(read.classes, read.labels.argmax(0))


@pytest.mark.parametrize("transform", [RandomAffine(), RandFlipd(TARGET_KEYS, prob=1.0, spatial_axis=1)])
def test_soft_labels_move_with_the_image(tmp_path: Path, transform: Any) -> None:
    target = soft_dataset(tmp_path, transform=transform)
    sample = target[0]
    assert sample["weight"].shape == (16, 16)
    assert not torch.allclose(sample["image"], target.read(0)["image"], atol=0.08)
    inside = sample["weight"] > 0.99
    assert inside.sum() > 100
    expected = soft_label(sample["image"])
    torch.testing.assert_close(sample["pseudo_label"][:, inside], expected[:, inside], atol=0.08, rtol=0)  # nearest


def test_refinement_with_soft_labels(trainer: Make, tmp_path: Path) -> None:
    module = SelfTrainingModule(TinyNet(), CLASSES)
    data = TargetDataModule(Images(6, labelled=True), Images(2, labelled=True), store_dir=tmp_path)
    fit = trainer(max_epochs=2, callbacks=[PseudoLabelCallback(CRST(regulariser="lrent"))])
    fit.fit(module, data)
    assert {"pseudo/changed", "pseudo/dice", "val/dice"} <= set(fit.callback_metrics)
    assert data.train_dataset[0]["pseudo_label"].shape == (CLASSES, 16, 16)


@pytest.mark.parametrize("module", [APLModule, SelfTrainingModule])
@pytest.mark.parametrize(
    "denoiser",
    [Threshold(0.99999), CBST(portion=1e-6, step=0.0), DPL(passes=8, eta=1e-9)],
    ids=lambda d: type(d).__name__,
)
def test_training_continues_without_kept_pixels(module: Any, denoiser: Any, trainer: Make, tmp_path: Path) -> None:
    refined = module(TinyNet(), CLASSES)
    data = TargetDataModule(Images(4), store_dir=tmp_path, batch_size=2)
    with pytest.warns(UserWarning, match="In round . no pixel has a weight above 0"):
        trainer(max_epochs=2, callbacks=[PseudoLabelCallback(denoiser)]).fit(refined, data)
    assert all(bool(torch.isfinite(p).all()) for p in refined.parameters())
    assert not any(data.train_dataset.store.read(index).weights.any() for index in range(4))


def test_spool_uses_temporary_files_beyond_its_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [ImageBatch([n], torch.rand(1, 1, 4, 4), [torch.ones(4, 4)], [""], [torch.ones(16)]) for n in range(3)]
    observed = [(torch.rand(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.long)) for _ in batches]
    one = sum(tensor.nbytes for tensor in (*observed[0], torch.ones(4, 4)))
    for memory, files in ((3 * one, 0), (3 * one - 1, 1), (0, 3)):
        spool = Spool(tmp_path, 0, torch.device("cpu"), memory)
        for batch, kept in zip(batches, observed, strict=True):
            spool.put(batch, kept)
        assert len(list(tmp_path.iterdir())) == files
        back = list(spool)
        assert [batch.indices for batch, _ in back] == [[0], [1], [2]]
        assert all(batch.images.device.type == "meta" and bool(batch.references[0].all()) for batch, _ in back)
        torch.testing.assert_close([tuple(kept) for _, kept in back], observed, rtol=0, atol=0)
        assert not list(tmp_path.iterdir())


def test_spool_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *_: open("/dev/full", "wb"))  # noqa: SIM115
    batch = ImageBatch([0], torch.rand(1, 1, 4, 4), [None], [""], [torch.ones(16)])
    spool = Spool(tmp_path, 0, torch.device("cpu"), memory=0)
    with pytest.raises(OSError, match="No space left on device while writing what the denoiser .*another `store_dir`"):
        spool.put(batch, (torch.rand(1, 4, 4),))


def test_resumed_run_continues_with_its_thresholds(trainer: Make, tmp_path: Path) -> None:
    def fit(denoiser: IAST, epochs: int, name: str, resume: Path | None = None) -> None:
        torch.manual_seed(0)
        module = SelfTrainingModule(TinyNet(), CLASSES)
        data = TargetDataModule(Images(6), store_dir=tmp_path / name)
        run = trainer(max_epochs=epochs, callbacks=[PseudoLabelCallback(denoiser)])
        run.fit(module, data, ckpt_path=resume)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")

    whole, first, second = IAST(), IAST(), IAST()
    fit(whole, 4, "whole")
    fit(first, 2, "parted")
    fit(second, 4, "parted", tmp_path / "parted.ckpt")
    assert torch.equal(whole.thresholds, second.thresholds)
    assert not torch.equal(first.thresholds, second.thresholds)


def test_features_need_two_heads() -> None:
    with pytest.raises(TypeError, match="DualHeadModel"):
        Predictor(TinyNet()).features(torch.rand(1, 1, 8, 8))


def test_features_need_whole_images() -> None:
    with pytest.raises(ValueError, match="inferer"):
        Predictor(APLModule(TinyNet(), CLASSES), lambda image, network: network(image)).features(torch.rand(1, 1, 8, 8))


def test_tent_trains_scales_and_shifts_of_batch_norm(trainer: Make) -> None:
    network = TinyNet()
    module = TentModule(network, CLASSES, learning_rate=0.1)
    trainer().fit(module, DataLoader(Images(8), batch_size=4))
    refined = module.export()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, refined.get_parameter(name))}
    assert moved == {"encoder.1.weight", "encoder.1.bias"}
    assert not torch.equal(refined.encoder[1].running_mean, network.encoder[1].running_mean)
    assert all(p.requires_grad for p in refined.parameters())


def test_tent_loss_is_the_entropy() -> None:
    module = TentModule(TinyNet(), CLASSES)
    image = torch.rand(2, 1, 8, 8)
    losses = module.losses((image, torch.zeros(2, 8, 8)))
    module.model.train()
    p = module(image).main.softmax(1)
    torch.testing.assert_close(losses["loss"], -(p * p.log()).sum(1).mean(), atol=1e-4, rtol=1e-4)


def test_tent_needs_batch_norm() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, CLASSES, 1))
    with pytest.raises(ValueError, match="BatchNorm"):
        TentModule(network, CLASSES)


@pytest.mark.parametrize("mode", ["auto", "adapt"])
def test_tent_re_estimates_no_statistics(mode: Any) -> None:
    with pytest.raises(ValueError, match="'train' or 'frozen'.*adapt_batch_norm"):
        TentModule(TinyNet(), CLASSES, batch_norm=mode)
    with pytest.raises(ValueError, match="Expected no `dice_weight`, but got 1.0: Tent has no labels"):
        TentModule(TinyNet(), CLASSES, dice_weight=1.0)


def labelled_batch(soft: bool = False) -> dict[str, Tensor]:
    labels = torch.rand(2, CLASSES, 8, 8).softmax(1) if soft else torch.randint(CLASSES, (2, 8, 8))
    return {"image": torch.rand(2, 1, 8, 8), "pseudo_label": labels, "weight": torch.rand(2, 8, 8)}


def test_dice_loss_of_soft_labels_in_training() -> None:
    given = labelled_batch(soft=True)
    module = SelfTrainingModule(TinyNet(), CLASSES, dice_weight=0.5, batch_norm="frozen")
    both = module.model(given["image"])
    weights = balanced_weights(given["pseudo_label"], given["weight"], CLASSES)
    dice = sum(weighted_dice_loss(z, given["pseudo_label"], weights) for z in both) / 2
    ce = (
        sum(
            (-(given["pseudo_label"] * z.log_softmax(1)).sum(1) * given["weight"]).sum() / given["weight"].sum()
            for z in both
        )
        / 2
    )
    torch.testing.assert_close(module.losses(given)["loss"], ce + 0.5 * dice)


class WithAuxiliaryBranch(TinyNet):
    """A second output with a BatchNorm of its own, as that of torchvision's FCN."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, CLASSES, 1))

    def forward(self, image: Tensor) -> Any:
        features = self.encoder(image)
        return self.classifier(features), self.branch(features)


def test_tent_reaches_all_that_it_trains() -> None:
    """DDP waits for the gradient of each trained parameter; those of the branch stay as they are."""
    module = TentModule(WithAuxiliaryBranch(), CLASSES, main_output=0)
    assert module.model.second is None, "the branch is the second head"
    loss = module.losses(torch.rand(2, 1, 8, 8))["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}
    assert {name for name, found in gradients.items() if found is not None and found.any()} == {
        "network.encoder.1.weight", "network.encoder.1.bias",
    }  # fmt: skip
    assert all(found is not None for found in gradients.values())


@pytest.mark.parametrize(
    "first", [lambda: TentModule(TinyNet(), CLASSES), lambda: APLModule(TinyNet(), CLASSES, consistency_weight=0.0)]
)
def test_network_of_another_module_is_trained_as_a_whole(first: Any) -> None:
    """What that module has excluded from training counts again."""
    module = SelfTrainingModule(first().model, CLASSES)
    assert all(parameter.requires_grad for parameter in module.model.parameters())


@pytest.mark.parametrize("denoiser", [IAST(), Threshold(normalise="all")], ids=lambda d: type(d).__name__)
def test_samples_that_fill_a_batch_do_not_count(denoiser: Any) -> None:
    """Losses over the ignored pixels see weight 0 in them too."""
    logits = Logits(torch.randn(3, CLASSES, 4, 4), torch.randn(3, CLASSES, 4, 4))
    labels, weights = torch.randint(CLASSES, (3, 4, 4)), (torch.rand(3, 4, 4) > 0.5).float()
    weights[2] = 0
    batch = {"pseudo_label": labels, "weight": weights, "repeated": torch.tensor([False, False, True])}
    alone = denoiser.loss(logits.main[:2], logits.aux[:2], labels[:2], weights[:2])
    torch.testing.assert_close(label_loss(denoiser, logits, batch, 0.0), alone)
    only = {name: value[2:] for name, value in batch.items()}
    assert label_loss(denoiser, Logits(logits.main[2:], logits.aux[2:]), only, 0.0).item() == 0

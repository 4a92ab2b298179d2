"""Errors name the mistake of the user and its solution."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader

from apl_lightning import (
    APLModule,
    PseudoLabelCallback,
    SelfTrainingModule,
    TargetDataModule,
    TentModule,
    add_dual_heads,
)


@pytest.mark.parametrize("kind", [APLModule, SelfTrainingModule])
@pytest.mark.parametrize("labelled", [False, True])
def test_training_without_pseudo_labels(trainer: Any, kind: Any, labelled: bool) -> None:
    loader = DataLoader(Images(2, labelled=labelled), 2)
    with pytest.raises(TypeError, match="`image`, `pseudo_label` and `weight`, but got .*with `PseudoLabelCallback`"):
        trainer().fit(kind(TinyNet(), CLASSES), loader)


def test_fit_without_target_images(trainer: Any) -> None:
    with pytest.raises(ValueError, match="target images for a fit, but got none: pass `train`"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), TargetDataModule())


@pytest.mark.parametrize("share", [75, -1, float("nan")])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match=r"`largest_component_share` in \[0, 1\], but got"):
        PseudoLabelCallback(largest_component_share=share)


def test_soft_labels_with_nan(tmp_path: Path, trainer: Any) -> None:
    def soft(p_main: Any, p_aux: Any) -> Any:
        return p_main * torch.nan, p_main[:, 0]

    data = TargetDataModule(Images(2), store_dir=tmp_path)
    with pytest.raises(ValueError, match=r"labels and weights, but the denoiser gave NaN for samples \[0, 1\]"):
        trainer(callbacks=[PseudoLabelCallback(soft)]).fit(APLModule(TinyNet(), CLASSES), data)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_labels_of_other_types_give_the_same_dice(trainer: Any, dtype: torch.dtype) -> None:
    """With uint8, `class * num_classes` overflows if there are 17 or more classes."""
    network = TinyNet(classes=20).eval()
    images = list(Images(3))
    with torch.no_grad():
        labels = [network(image[None]).argmax(1).to(dtype) for image in images]  # (1, H, W), as in MONAI
    module = APLModule(network, 20)
    (found,) = trainer().validate(module, DataLoader(list(zip(images, labels, strict=True)), 3), verbose=False)
    assert found["val/dice"] == 1


def test_batches_that_are_lists_of_samples(trainer: Any) -> None:
    loader = DataLoader([{"image": image} for image in Images(2)], 2, collate_fn=list)
    with pytest.raises(TypeError, match="stacked images, but got a list of 2 dictionaries: let `collate_fn` stack"):
        trainer().fit(TentModule(TinyNet(), CLASSES), loader)


def test_a_network_with_two_heads_is_copied() -> None:
    """A method that trains little leaves all to the next one."""
    dual = add_dual_heads(TinyNet(), CLASSES)
    counts = [
        sum(p.requires_grad for p in kind(dual, CLASSES).model.parameters())
        for kind in (SelfTrainingModule, TentModule, SelfTrainingModule)
    ]
    assert counts[0] == counts[2] > counts[1]
    with pytest.raises(ValueError, match="no `head` with a model that has two heads already: pass it to `add_dual_he"):
        APLModule(dual, CLASSES, head="classifier")
    with pytest.raises(ValueError, match="no `aux` with a model"):
        APLModule(dual, CLASSES, aux="fresh")


def test_a_checkpoint_of_a_network_with_two_heads(tmp_path: Path, trainer: Any) -> None:
    """It is loaded into either kind of network."""
    module = APLModule(TinyNet(), CLASSES, aux="perturbed")
    run = trainer(max_epochs=0)
    run.fit(module, TargetDataModule(Images(2), store_dir=tmp_path))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    for network in (TinyNet(), add_dual_heads(TinyNet(), CLASSES)):
        loaded = APLModule.load_from_checkpoint(tmp_path / "saved.ckpt", model=network, weights_only=False)
        assert torch.equal(loaded.model.network.classifier.weight, module.model.network.classifier.weight)


def test_run_is_saved_and_resumed_after_validation(tmp_path: Path, trainer: Any) -> None:
    module = APLModule(TinyNet(), CLASSES)
    data = TargetDataModule(Images(4), Images(2, labelled=True), store_dir=tmp_path)
    run = trainer(callbacks=[PseudoLabelCallback()])
    run.fit(module, data)
    run.validate(module, data, verbose=False)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = PseudoLabelCallback()
    data = TargetDataModule(Images(4), Images(2, labelled=True), store_dir=tmp_path)
    trainer(callbacks=[resumed], max_epochs=2).fit(
        APLModule(TinyNet(), CLASSES), data, ckpt_path=tmp_path / "saved.ckpt", weights_only=False
    )
    assert resumed.round == 1


@pytest.mark.parametrize(
    ("method", "finder"), [("lr_find", "LearningRateFinder"), ("scale_batch_size", "BatchSizeFinder")]
)
def test_tuner_is_refused(tmp_path: Path, trainer: Any, method: str, finder: str) -> None:
    tuner = Tuner(trainer(callbacks=[PseudoLabelCallback()]))
    data = TargetDataModule(Images(4), store_dir=tmp_path / "labels")
    with pytest.raises(ValueError, match=f"no `{finder}`, which `Tuner` adds too.*new trainer, and pass `learning_"):
        getattr(tuner, method)(APLModule(TinyNet(), CLASSES), datamodule=data)


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_deleted_during_the_run(tmp_path: Path, trainer: Any, workers: int) -> None:
    class Delete(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")
                (tmp_path / "labels").rename(tmp_path / "deleted")  # all at once, as workers read meanwhile

    def fit(*callbacks: Any, **options: Any) -> None:
        data = TargetDataModule(Images(8), batch_size=1, num_workers=workers, store_dir=tmp_path / "labels")
        trainer(callbacks=[PseudoLabelCallback(), *callbacks]).fit(APLModule(TinyNet(), CLASSES), data, **options)

    with pytest.raises(RuntimeError, match="If the run has one, the labels were deleted.*from its last checkpoint"):
        fit(Delete())
    with pytest.warns(UserWarning, match="made anew"), pytest.warns(UserWarning, match="The best network so far"):
        fit(ckpt_path=tmp_path / "saved.ckpt", weights_only=True)


@pytest.mark.parametrize("reads", ["data module", "loader"])
def test_scaled_labels(trainer: Any, reads: str) -> None:
    """As `to_tensor` makes them of a mask: 1 becomes 1/255, which would be background."""
    scaled = [(image, label / 255) for image, label in Images(2, labelled=True)]
    data: Any = TargetDataModule(val=scaled) if reads == "data module" else DataLoader(scaled)
    with pytest.raises(ValueError, match="class indices in the label of .*, but got fractions from 0 to 0.0"):
        trainer().validate(APLModule(TinyNet(), CLASSES), data, verbose=False)


def test_samples_with_a_name_or_a_class(tmp_path: Path, trainer: Any) -> None:
    for extra, message in (((0, "name"), "tuple of 3: return a dictionary"), ((0,), "return the image alone")):
        data = TargetDataModule([(image, *extra) for image in Images(2)], store_dir=tmp_path)
        with pytest.raises((TypeError, ValueError), match=message):
            trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), data)


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")  # in the module: what is tested
def test_random_transfer_hook_of_a_module(tmp_path: Path, trainer: Any) -> None:
    class Noisy(APLModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "image": batch["image"] + torch.randn(())}

    run = trainer(callbacks=[PseudoLabelCallback()])
    with pytest.raises(ValueError, match="transfer hooks .* to be deterministic.*pass random transforms as"):
        run.fit(Noisy(TinyNet(), CLASSES), TargetDataModule(Images(2), store_dir=tmp_path))


def test_learning_rate_within_the_optimiser() -> None:
    with pytest.raises(ValueError, match=r"without a learning rate, but got lr=0.01: pass it as `learning_rate`"):
        APLModule(TinyNet(), CLASSES, optimizer=partial(torch.optim.SGD, lr=0.01))


def test_instances_and_files_in_place_of_classes_and_networks() -> None:
    network: Any = TinyNet()
    for optimizer in (torch.optim.SGD(network.parameters(), 0.1), "sgd"):
        with pytest.raises(TypeError, match=r"(?s)Expected `optimizer` to be a class .*: pass the class"):
            APLModule(network, CLASSES, optimizer=optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to be a network, but got 'net.pt': build it"):
        APLModule("net.pt", CLASSES)  # type: ignore[arg-type]


def test_boolean_labels_of_a_function(tmp_path: Path, trainer: Any) -> None:
    def foreground(p_main: Any, p_aux: Any) -> Any:
        return p_main[:, 1] > 0.5, torch.ones_like(p_main[:, 0])

    callback = PseudoLabelCallback(foreground)
    data = TargetDataModule(Images(2), store_dir=tmp_path)
    trainer(callbacks=[callback]).fit(APLModule(TinyNet(classes=2), 2), data)
    assert callback.statistics["pseudo/confidence"] == 1

"""What a module sees of the target images before the first round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from apl_lightning import APLModule, PseudoLabelCallback, SelfTrainingModule, TargetDataModule
from apl_lightning.denoisers import CBST, MRNet
from apl_lightning.labels import Labelling
from apl_lightning.labels.spool import Spool


def test_preparation_reads_all_images_shuffled(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        APLModule, "prepare_refinement", lambda self, images: seen.extend(b[:, 0, 0, 0].long().tolist() for b in images)
    )
    flat = [torch.full((1, 8, 8), float(n)) for n in range(37)]
    data = TargetDataModule(flat, store_dir=tmp_path, transform=None)
    trainer(max_steps=1, callbacks=[PseudoLabelCallback(guard="off")]).fit(
        APLModule(TinyNet(), CLASSES, batch_norm="adapt"), data
    )
    order = [number for batch in seen for number in batch]
    assert sorted(order) == list(range(37))
    assert order != list(range(37))
    assert [len(b) for b in seen] == [16, 16, 5]


def test_nothing_to_choose_takes_no_pass(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a guard, and without BatchNorm in the network, no pixel is sampled."""
    monkeypatch.setattr(Labelling, "look", lambda *_: pytest.fail("a pass over the images"))
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, CLASSES, 1))
    module, callback = APLModule(network, CLASSES), PseudoLabelCallback(guard="off")
    assert module.batch_norm == "auto"
    trainer(max_steps=1, callbacks=[callback]).fit(module, TargetDataModule(Images(4), store_dir=tmp_path))
    assert callback.selection.sample is None


def test_agreement_of_merged_heads_is_not_logged(tmp_path: Path, trainer: Any) -> None:
    callback = PseudoLabelCallback(denoiser=MRNet(flips=()), guard="off")
    data = TargetDataModule(Images(4), store_dir=tmp_path)
    trainer(max_steps=1, callbacks=[callback]).fit(SelfTrainingModule(TinyNet(), CLASSES), data)
    assert "pseudo/agreement" not in callback.statistics
    assert "pseudo/confidence" in callback.statistics


class WithReconstruction(TinyNet):
    """Returns a colour image too, with as many channels as there are classes."""

    def __init__(self) -> None:
        super().__init__()
        self.paint = nn.Conv2d(6, CLASSES, 1)
        for layer, largest in ((self.classifier, 0), (self.paint, 1)):
            nn.init.constant_(layer.bias[largest : largest + 1], 10.0)

    def forward(self, image: Tensor) -> Any:
        features = self.encoder(image)
        return self.classifier(features), self.paint(features)


def test_an_output_that_is_no_segmentation_is_named(tmp_path: Path, trainer: Any) -> None:
    data = TargetDataModule(Images(4), store_dir=tmp_path / "own")
    with pytest.warns(UserWarning, match="the two heads agree on 0% of the pixels .* aux='perturbed'"):
        trainer(max_steps=1, callbacks=[PseudoLabelCallback()]).fit(APLModule(WithReconstruction(), CLASSES), data)
    cured = APLModule(WithReconstruction(), CLASSES, aux="perturbed", main_output=0)
    data = TargetDataModule(Images(4), store_dir=tmp_path / "cured")
    trainer(max_steps=1, callbacks=[PseudoLabelCallback()]).fit(cured, data)


def test_transfer_hook_in_place_runs_once(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(TargetDataModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            batch["image"].sub_(100)
            return batch

    seen: list[float] = []
    monkeypatch.setattr(
        APLModule, "prepare_refinement", lambda self, images: seen.extend(x for b in images for x in b[:, 0, 0, 0])
    )
    data = Shifted([torch.full((1, 8, 8), float(n)) for n in range(20)], store_dir=tmp_path, transform=None)
    trainer(max_steps=1, callbacks=[PseudoLabelCallback(guard="off")]).fit(APLModule(TinyNet(), CLASSES), data)
    assert sorted(seen) == [n - 100 for n in range(20)]


@pytest.mark.parametrize(("names", "stride"), [(CLASSES - 1, 1), (CLASSES + 2, 1), (CLASSES, 2)])
def test_predictions_that_do_not_fit(tmp_path: Path, trainer: Any, names: int, stride: int) -> None:
    """A module of one's own with other names than channels, or logits of another size than the images."""

    class Own(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, CLASSES, 1, stride)
            self.class_names = [str(c) for c in range(names)]

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(image), -self.layer(image)

        def training_step(self, batch: Any) -> Any: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = TargetDataModule(Images(2), store_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"shape \(2, {names}, 16, 16\), with a channel for each of `class_names`"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(Own(), data)


def test_new_patches_in_each_pass(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        APLModule, "warm_up", lambda self, images: seen.extend(torch.cat(list(images)) for _ in range(2))
    )
    data = TargetDataModule([torch.rand(1, 32, 32) for _ in range(4)], store_dir=tmp_path, patch_size=(8, 8))
    trainer(max_steps=1, callbacks=[PseudoLabelCallback(guard="off")]).fit(
        APLModule(TinyNet(), CLASSES, batch_norm="frozen"), data
    )
    first, second = seen
    assert first.shape == second.shape == (4, 1, 8, 8)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_kept_of_a_batch(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Neither a file of a worker, of which a process may open 1024, nor the tensor that it is a part of."""
    batches: list[Any] = []
    put = Spool.put
    monkeypatch.setattr(Spool, "put", lambda self, batch, *more: [batches.append(batch), put(self, batch, *more)][1])
    images = TensorDataset(torch.rand(6, 1, 16, 16), torch.randint(CLASSES, (6, 16, 16)))
    data = TargetDataModule(images, store_dir=tmp_path, transform=None, num_workers=workers)
    trainer(max_steps=1, callbacks=[PseudoLabelCallback(CBST())]).fit(APLModule(TinyNet(), CLASSES), data)
    kept = [tensor for batch in batches for tensor in (*batch.references, *batch.fingerprints)]
    assert len(kept) == 12
    assert not any(tensor.is_shared() for tensor in kept)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_workers_send_single_samples(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the whole tensor of which a sample is a part."""
    sizes = []
    stack = torch.stack

    def recorded(tensors: list[Tensor], *args: Any, **options: Any) -> Tensor:
        sizes.extend(tensor.untyped_storage().nbytes() / tensor.nbytes for tensor in tensors if tensor.is_shared())
        return stack(tensors, *args, **options)

    monkeypatch.setattr(torch, "stack", recorded)
    images = TensorDataset(torch.rand(6, 1, 16, 16))
    data = TargetDataModule(images, store_dir=tmp_path, transform=None, num_workers=1)
    trainer(max_steps=1, callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), data)
    assert sizes
    assert set(sizes) == {1.0}


class Pooled(TinyNet):
    """Has BatchNorm behind global pooling, as squeeze-and-excitation blocks and ASPP do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))

    def forward(self, image: Tensor) -> Tensor:
        features = self.encoder(image)
        return self.classifier(features + self.pool(features))


def test_last_batch_of_one_image(tmp_path: Path, trainer: Any) -> None:
    module = APLModule(Pooled(), CLASSES, batch_norm="adapt")
    trainer(callbacks=[PseudoLabelCallback(batch_size=2, guard="off")]).fit(
        module, TargetDataModule(Images(3), batch_size=3, store_dir=tmp_path)
    )
    assert module.model.network.pool[2].running_mean.any()

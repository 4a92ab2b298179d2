"""What a module sees of the target images before the first round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, TinyNet
from torch import Tensor, nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule


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

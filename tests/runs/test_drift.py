"""Thin rings stay over many rounds of labels; with an interpolated image they are lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning import APLModule, PseudoLabelCallback, RandomAffine, TargetDataModule

Make = Callable[..., pl.Trainer]


class Interpolated(RandomAffine):
    """The same moves with the image sampled bilinearly."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        state = torch.random.get_rng_state()
        moved = super().__call__(sample)
        torch.random.set_rng_state(state)
        image = sample["image"]
        grid = F.affine_grid(self._draw(image.shape[1:])[None], [1, *image.shape], align_corners=False)
        return {**moved, "image": F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]}


def rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of rings that are one pixel thin, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images, labels = [], []
    for _ in range(count):
        y, x = (torch.rand(2, generator=generator) * 8 + 12).tolist()
        radius = float(torch.rand((), generator=generator) * 3 + 7)
        label = ((((rows - y) ** 2 + (columns - x) ** 2).sqrt() - radius).abs() < 0.6).long()
        images.append((label + 0.35 * torch.randn(32, 32, generator=generator))[None])
        labels.append(label)
    return torch.stack(images), torch.stack(labels)


@pytest.fixture(scope="module")
def ring_network() -> nn.Module:
    """A network that finds rings."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        nn.Conv2d(12, 2, 1),
    )
    images, labels = rings(64, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(100):
        some = torch.randint(64, (16,))
        loss = F.cross_entropy(network(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def ring_dice(network: nn.Module) -> float:
    images, labels = rings(32, seed=1)
    predicted = network(images).argmax(1)
    return float(2 * (predicted * labels).sum() / (predicted.sum() + labels.sum()))


@pytest.mark.parametrize(("transform", "low", "high"), [(RandomAffine(), 0.91, 1.0), (Interpolated(), 0.0, 0.85)])
def test_ten_rounds_on_thin_rings(
    tmp_path: Path, trainer: Make, ring_network: nn.Module, transform: Any, low: float, high: float
) -> None:
    """The network learns from its own labels alone, which can only lose; without interpolation it does not."""
    assert ring_dice(ring_network) > 0.92
    module = APLModule(ring_network, 2, batch_norm="frozen", learning_rate=3e-3)
    data = TargetDataModule(list(rings(32, seed=1)[0]), batch_size=4, transform=transform, store_dir=tmp_path)
    callback = PseudoLabelCallback(guard="off", ignore_small_components=False)
    trainer(max_epochs=10, callbacks=[callback]).fit(module, data)
    assert low < ring_dice(module.export()) < high

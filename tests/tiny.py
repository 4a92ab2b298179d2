"""A small network and small data sets, for tests and for launched processes, which do not import pytest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = 3


class TinyNet(nn.Module):
    """An encoder with BatchNorm and a 1 x 1 classifier."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.classifier = nn.Conv2d(6, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.encoder(image))
        return logits


class Images(Dataset[Any]):
    """Images of random noise; with `labelled`, pairs of image and label."""

    def __init__(self, count: int = 6, size: tuple[int, int] = (16, 16), labelled: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = [torch.rand(1, *size, generator=generator) for _ in range(count)]
        self.labels = [torch.randint(CLASSES, size, generator=generator) for _ in range(count)] if labelled else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index] if self.labels is None else (self.images[index], self.labels[index])


class Slices(Images):
    """Dictionaries of image and case: the slices of two patients in alternating order."""

    def __init__(self, count: int, case_key: str = "case") -> None:
        super().__init__(count)
        self.case_key = case_key

    def __getitem__(self, index: int) -> Any:
        return {"image": self.images[index], self.case_key: index % 2}

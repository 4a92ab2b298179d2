"""Small networks and data sets that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = 3

# The networks are tiny and some tests run two processes on two cores: threads would only wait for each other.
torch.set_num_threads(1)


# What leaves gigabytes in the process: a fork of it takes a second, and the tests of killed runs fork a hundred times.
LARGE = ("test_architectures", "test_checkpoint_loading", "test_checkpoint_golden", "test_checkpoint_refine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Large networks come last."""
    items.sort(key=lambda item: item.path.stem in LARGE)


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
    """Noise images; with `labelled`, `(image, label)`."""

    def __init__(self, count: int = 6, size: tuple[int, int] = (16, 16), labelled: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = [torch.rand(1, *size, generator=generator) for _ in range(count)]
        self.labels = [torch.randint(CLASSES, size, generator=generator) for _ in range(count)] if labelled else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index] if self.labels is None else (self.images[index], self.labels[index])


class Slices(Images):
    """Dictionaries of image and case: two patients whose slices take turns."""

    def __init__(self, count: int, case_key: str = "case") -> None:
        super().__init__(count)
        self.case_key = case_key

    def __getitem__(self, index: int) -> Any:
        return {"image": self.images[index], self.case_key: index % 2}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests of large networks, where no second test process has the other core."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield
    torch.set_num_threads(1)


def fork_further() -> None:
    """Let a forked process start `ddp_fork`: after any look for a GPU in its parent, Lightning would forbid it."""
    torch.cuda._is_in_bad_fork = lambda: False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def network() -> TinyNet:
    return TinyNet()


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., pl.Trainer]:
    """A silent trainer on one CPU, in a folder of its own."""

    def make(**options: Any) -> pl.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(**{**defaults, **options})

    return make

"""Fixtures of all tests, and the small network and data sets of `tiny.py`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import CLASSES, Images, Slices, TinyNet

__all__ = ["CLASSES", "Images", "Slices", "TinyNet"]

# All tests run on the CPU, and a process that has looked for a GPU cannot be forked.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The networks are tiny, and some tests run two processes on two cores: more threads would be slower.
torch.set_num_threads(1)


# These tests leave gigabytes in the process. Forking it then takes a second, and the tests of killed runs fork often.
LARGE = ("test_architectures", "test_checkpoint_loading", "test_checkpoint_golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests with large networks last."""
    items.sort(key=lambda item: item.path.stem in LARGE)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Use two threads for large networks, unless another test process needs the second core."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield
    torch.set_num_threads(1)


def fork_further() -> None:
    """Allow `ddp_fork` in a forked process: Lightning refuses it if the parent process has looked for a GPU."""
    torch.cuda._is_in_bad_fork = lambda: False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    # An earlier `seed_everything` would seed forked processes anew.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def network() -> TinyNet:
    return TinyNet()


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., pl.Trainer]:
    """Make trainers on one CPU without output, in a temporary folder."""

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


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Import an example by name; the working directory is a temporary folder."""
    for folder in ("", "uda", "benchmarks"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return importlib.import_module

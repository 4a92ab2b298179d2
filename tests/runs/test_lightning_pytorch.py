"""The tests of hooks, resumed runs and several processes once more, with `lightning.pytorch`.

Their source is read with the names of the other package. Left out is what does not depend on the package: methods, odd
samples, and a second place where a run is killed.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest

TESTS = Path(__file__).parents[1]
REPLACED = {
    "import pytorch_lightning as pl": "import lightning.pytorch as pl",
    "from pytorch_lightning": "from lightning.pytorch",
    "from apl_lightning import": "from apl_lightning.lightning_pytorch import",
}

TAKEN = {
    "_support/test_lightning": [
        "test_as",
        "test_b",
        "test_over",
        "test_record",
        "test_refuse_[tw]",
        "test_to",
        "test_v",
    ],
    "test_callback": ["test_uninterrupted", "test_resumed_inside", "test_lost", "test_loader_that"],
    "data/test_project": ["test_[a-h]", "test_transfer"],
    "guard/test_guard": ["test_restore", "test_resumed_run"],
    "refinement/test_evaluation_steps": ["test_"],
    "refinement/test_load_from_checkpoint": ["test_"],
    "runs/test_max_steps": ["test_"],
    "runs/test_ddp": ["test_weights_with", "test_step_on", "test_validation_counts", "test_error_on_one_rank"],
    "runs/test_resume": ["test_resumed_between", "test_terminated_run"],
}


def other_tests(name: str, patterns: list[str]) -> dict[str, Any]:
    """The fixtures of a file, and its tests whose names match a pattern, for the other package."""
    path = TESTS / f"{name}.py"
    source = path.read_text()
    for ours, theirs in REPLACED.items():
        source = source.replace(ours, theirs)
    module = types.ModuleType(f"{path.stem}_lightning")
    exec(compile(source, str(path), "exec"), vars(module))
    assert all(any(re.match(pattern, name) for name in vars(module)) for pattern in patterns), patterns
    found = {}
    for key, value in vars(module).items():
        if key.startswith("test_") and any(re.match(pattern, key) for pattern in patterns):
            found[f"{key}_of_{path.stem}"] = value
        elif type(value).__name__ == "FixtureFunctionDefinition" and value.__module__ == module.__name__:
            found[key] = value
    return found


for file, names in TAKEN.items():
    globals().update(other_tests(file, names))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., lightning.pytorch.Trainer]:
    """As the fixture of all tests, for the other package."""

    def make(**options: Any) -> lightning.pytorch.Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": tmp_path}
        return lightning.pytorch.Trainer(**{**defaults, **dict.fromkeys(quiet, False), **options})

    return make

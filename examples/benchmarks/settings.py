"""Settings of the benchmark of methods: a data set, a direction between its two modalities, and a budget."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from slices import Slices, class_names, read_meta

FORWARD = {name: name for name in ("source_train", "target_adapt", "target_val")}
BACKWARD = {"source_train": "target_adapt", "target_adapt": "source_train", "target_val": "source_val"}


class Budget(NamedTuple):
    """What all runs of a benchmark share."""

    network: str
    size: int
    every: int
    fraction: float
    source_steps: int
    systems: str
    steps: int
    round_steps: int
    precision: str


class Setting(NamedTuple):
    """A data set, the splits in one direction, and the folder of its base networks and runs."""

    data: Path
    name: str
    splits: dict[str, str]
    out: Path
    budget: Budget

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, background included."""
        return class_names(self.data)

    def read(self, split: str, labelled: bool = True) -> Slices:
        """Read a split in the direction of the setting; of the target images to refine on only every n-th slice."""
        every = self.budget.every if split == "target_adapt" else 1
        return Slices(self.data, self.splits[split], self.budget.size, labelled, self.budget.fraction, every)


def read_budget(out: Path) -> Budget:
    """Read the budget that `methods.py` has saved next to its runs."""
    saved = json.loads((out / "budget.json").read_text())
    return Budget(**{**saved, "systems": next(iter(saved["systems"]))})


def settings_of(data: Path, out: Path, budget: Budget) -> list[Setting]:
    """Both directions of a data set, named after its folder and its modalities, such as `abdomen-mr-to-ct`."""
    meta = read_meta(data)
    domains = {case["id"]: case["domain"] for case in meta["cases"]}
    source, target = (domains[meta["split"][split][0]] for split in ("source_train", "target_adapt"))
    names = {f"{data.name}-{source}-to-{target}": FORWARD, f"{data.name}-{target}-to-{source}": BACKWARD}
    if source == target:
        raise SystemExit(f"Expected two modalities in {data}, but got {source!r} for source and target.")
    return [Setting(data, name, splits, out / name, budget) for name, splits in names.items()]


def all_settings(folders: Iterable[Path], out: Path, budget: Budget) -> list[Setting]:
    """Both directions of several data sets, whose folders and modalities must have different names."""
    settings = [setting for data in folders for setting in settings_of(data, out, budget)]
    names = [setting.name for setting in settings]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SystemExit(f"Expected settings of different names, but got {repeated} twice: rename a folder of --data.")
    return settings


def trainer(budget: Budget, **options: Any) -> pl.Trainer:
    """Create a trainer on one device without output; `options` limit the run."""
    return pl.Trainer(
        **{"max_epochs": -1, **options},
        devices=1,
        precision=budget.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )

"""Hyperparameters as every logger takes them: plain values by name."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from apl_lightning._support.lightning import Trainer


def named(name: str, thing: object, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`<name>/name` of an object with its `values` as `<name>/<key>`, by default the fields of a dataclass."""
    if values is None:
        known = fields(thing) if is_dataclass(thing) else ()
        values = {each.name: getattr(thing, each.name) for each in known if each.init}
    plain = {key: _plain(value) for key, value in values.items()}
    return {f"{name}/{key}": value for key, value in {"name": name_of(thing), **plain}.items()}


def optimisation(trainer: Trainer) -> dict[str, Any]:
    """The defaults of the optimiser, and the name of a learning rate scheduler."""
    found: dict[str, Any] = {}
    for optimizer in trainer.optimizers[:1]:  # automatic optimisation has one
        found |= named("optimizer", optimizer, optimizer.defaults)
    for config in trainer.lr_scheduler_configs[:1]:
        found |= named("lr_scheduler", config.scheduler)
    return found


def name_of(thing: object) -> str | None:
    """The name of a function, or of the class of another object."""
    return None if thing is None else getattr(thing, "__name__", type(thing).__name__)


def without_numpy(value: Any) -> Any:
    """A value, or a list of them, with scalars and arrays of NumPy as numbers, texts and lists."""
    if isinstance(value, list | tuple):
        return [without_numpy(each) for each in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)

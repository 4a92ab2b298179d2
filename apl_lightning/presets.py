"""Named sets of options."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Arguments for the three pieces of a refinement run."""

    module: Mapping[str, Any]
    callback: Mapping[str, Any]
    data: Mapping[str, Any]


PAPER = Preset(
    module=MappingProxyType(
        {
            "batch_norm": "frozen",
            "weighting": "confusion",
            "consistency_weight": 1.0,
            "refinement_weight": 1.0,
            "head_rate": 1.0,
            "ema_decay": None,
        }
    ),
    callback=MappingProxyType({"every_n_epochs": 1, "ignore_small_components": False}),
    data=MappingProxyType({"transform": None}),
)
"""The paper to the letter.

Nothing of it is public beyond its equations, so whatever they do not name (BatchNorm re-estimated, images moved in
training, heads that learn more slowly, the mean over steps, small components ignored) is switched off. Use it as
`APLModule(model, 5, **PAPER.module)`, `PseudoLabelCallback(**PAPER.callback)` and
`TargetDataModule(images, **PAPER.data)`.
"""

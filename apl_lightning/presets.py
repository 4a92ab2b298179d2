"""Named sets of options."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Arguments of module, callback and data module."""

    module: Mapping[str, Any]
    callback: Mapping[str, Any]
    data: Mapping[str, Any]


_LOSSES = {"weighting": "confusion", "consistency_weight": 1.0, "refinement_weight": 1.0, "dice_weight": 0.0}
_STEPS = {"learning_rate": 3e-4, "head_rate": 1.0, "dropout": True, "ema_decay": None}
PAPER = Preset(
    module=MappingProxyType({"batch_norm": "frozen", **_LOSSES, **_STEPS}),
    callback=MappingProxyType(
        {"every_n_epochs": 1, "patience": None, "ignore_small_components": False, "guard": "off"}
    ),
    data=MappingProxyType({"transform": None}),
)
"""Paper settings.

Only the equations of the paper are public. Everything else is off: re-estimated BatchNorm, the joint transform, the
Dice loss, a lower learning rate of the heads, the moving average, the treatment of small components, labels that stay
(`patience`), and the guard. Dropout is active, as in usual training. The paper has no learning rate; without a moving
average, 3e-4 is safer than the default. Use it as `APLModule(model, 5, **PAPER.module)`,
`PseudoLabelCallback(**PAPER.callback)` and `TargetDataModule(images, **PAPER.data)`.
"""

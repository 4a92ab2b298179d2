"""Recipes of the benchmark: module, callback and data of each method.

All methods share optimiser, learning rate, batch size, number of epochs and joint transform. APL has two losses; the
other methods train all parameters on their labels. Only the defaults of APL re-estimate the BatchNorm statistics of the
base and ignore small components; the variants of the defaults change one part each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from apl_lightning import APLModule, RefinementModule, SelfTrainingModule
from apl_lightning.denoisers import BDL, CBST, CRST, DPL, IAST, UPL, Chebyshev, MRNet, Threshold
from apl_lightning.presets import PAPER

COUNTED = {"ignore_small_components": False}
ONCE = 10**6  # as `every_n_epochs`: labels only before the first epoch


class Recipe(NamedTuple):
    """The module class and the options of module, callback and data module."""

    module: type[RefinementModule]
    options: dict[str, Any]
    callback: Callable[[], dict[str, Any]]
    data: dict[str, Any]


def _peer(make: Callable[[], Any], **options: Any) -> Recipe:
    callback = lambda: {"denoiser": make(), **options}  # noqa: E731
    return Recipe(SelfTrainingModule, {"batch_norm": "frozen"}, callback, {})


RECIPES = {
    "threshold": _peer(lambda: Threshold(0.9)),
    "CBST": _peer(CBST),
    # A horizontal flip would turn a left kidney into a right one.
    "MRNet": _peer(lambda: MRNet(flips=()), every_n_epochs=ONCE),
    "IAST": _peer(IAST),
    "DPL": _peer(DPL, every_n_epochs=ONCE),
    # These networks never see rotations by 90 degrees in training: with the four published views no pixel is kept.
    "UPL, one view": _peer(lambda: UPL(views=1)),
    "APL, L_Con only": Recipe(APLModule, {"batch_norm": "frozen", "refinement_weight": 0.0}, COUNTED.copy, {}),
    "APL, paper settings": Recipe(APLModule, dict(PAPER.module), lambda: dict(PAPER.callback), dict(PAPER.data)),
    "APL, defaults": Recipe(APLModule, {}, dict, {}),
}
MORE = {
    "pseudo labels": _peer(lambda: Threshold(0.0)),
    "BDL": _peer(BDL),
    "CRST": _peer(CRST),
    "UPL": _peer(UPL),
    "Chebyshev": _peer(Chebyshev),
    # The two best other methods, with this part of the defaults of APL.
    "threshold, small components ignored": _peer(lambda: Threshold(0.9), ignore_small_components=True),
    "UPL, one view, small components ignored": _peer(lambda: UPL(views=1), ignore_small_components=True),
    # The defaults of APL without one of their parts.
    "APL, small components counted": Recipe(APLModule, {}, COUNTED.copy, {}),
    "APL, no teacher": Recipe(APLModule, {"ema_decay": None}, dict, {}),
    "APL, heads at the full rate": Recipe(APLModule, {"head_rate": 1.0}, dict, {}),
    "APL, no L_Con": Recipe(APLModule, {"consistency_weight": 0.0}, dict, {}),
    "APL, weights of 1": Recipe(
        APLModule, {}, lambda: {"denoiser": Threshold(0.0), "ignore_small_components": True}, {}
    ),
    "APL, BatchNorm of the source": Recipe(APLModule, {"batch_norm": "frozen"}, dict, {}),
    "APL, images unmoved": Recipe(APLModule, {}, dict, {"transform": None}),
}

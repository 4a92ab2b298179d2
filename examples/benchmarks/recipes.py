"""How each method of the benchmark refines a base: the three pieces of a run.

Optimiser, learning rate, batch size, epochs and the joint transform are the same for all. The peers train every
parameter on their labels; APL has its two losses. A base comes with the BatchNorm statistics that are to be judged, so
all but "APL, defaults" leave them alone; nor do they ignore small components.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from apl_lightning import APLModule, SelfTrainingModule
from apl_lightning.denoisers import BDL, CBST, CRST, DPL, IAST, UPL, Chebyshev, MRNet, Threshold
from apl_lightning.presets import PAPER

COUNTED = {"ignore_small_components": False}
ONCE = 10**6  # labels before each so-manieth epoch: before the first alone


class Recipe(NamedTuple):
    """The module's class, and what the module, the callback and the data module are given."""

    module: type[APLModule]
    options: dict[str, Any]
    callback: Callable[[], dict[str, Any]]
    data: dict[str, Any]


def _peer(make: Callable[[], Any], **options: Any) -> Recipe:
    callback = lambda: {"denoiser": make(), **options}  # noqa: E731
    return Recipe(SelfTrainingModule, {"batch_norm": "frozen"}, callback, {})


RECIPES = {
    "threshold": _peer(lambda: Threshold(0.9)),
    "CBST": _peer(CBST),
    # Mirrored left and right, a left kidney would be a right one.
    "MRNet": _peer(lambda: MRNet(flips=()), every_n_epochs=ONCE),
    "IAST": _peer(IAST),
    "DPL": _peer(DPL, every_n_epochs=ONCE),
    # Nor has any of these networks seen an image turned by 90 degrees: with the original's four views nothing is left.
    "UPL, one view": _peer(lambda: UPL(views=1)),
    "APL, L_Con only": Recipe(APLModule, {"batch_norm": "frozen", "refinement_weight": 0.0}, COUNTED.copy, {}),
    "APL, the letter": Recipe(APLModule, dict(PAPER.module), lambda: dict(PAPER.callback), dict(PAPER.data)),
    "APL, defaults": Recipe(APLModule, {}, dict, {}),
}
MORE = {
    "pseudo labels": _peer(lambda: Threshold(0.0)),
    "BDL": _peer(BDL),
    "CRST": _peer(CRST),
    "UPL": _peer(UPL),
    "Chebyshev": _peer(Chebyshev),
    # The two peers that come closest, with this part of the defaults.
    "threshold, small components ignored": _peer(lambda: Threshold(0.9), ignore_small_components=True),
    "UPL, one view, small components ignored": _peer(lambda: UPL(views=1), ignore_small_components=True),
    # The defaults without one of their parts.
    "APL, small components counted": Recipe(APLModule, {}, COUNTED.copy, {}),
    "APL, no teacher": Recipe(APLModule, {"ema_decay": None}, dict, {}),
    "APL, heads at the full rate": Recipe(APLModule, {"head_rate": 1.0}, dict, {}),
    "APL, no L_Con": Recipe(APLModule, {"consistency_weight": 0.0}, dict, {}),
    "APL, weights of 1": Recipe(
        APLModule, {}, lambda: {"denoiser": Threshold(0.0), "ignore_small_components": True}, {}
    ),
    "APL, BatchNorm as it came": Recipe(APLModule, {"batch_norm": "frozen"}, dict, {}),
    "APL, images unmoved": Recipe(APLModule, {}, dict, {"transform": None}),
}

"""Recipes of the benchmark: module, callback and data of each method.

Batch size and number of steps are the same for all methods, and so are optimiser and joint transform where a row does
not say otherwise. APL has two losses; the other methods train all parameters on their labels. Each of them has three
rows:

- with its published parameters, the learning rate of the paper settings, and the statistics of BatchNorm that come with
  the base;
- `+ extras`: with all other defaults of APL but the rate of the heads: learning rate, Dice loss, no dropout, choice of
  BatchNorm, moving average, small components ignored, the number of rounds, and the guard; MRNet and DPL label once in
  all rows, as published;
- `, own rate`: the first row with the optimiser and the learning rate of its published code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from apl_lightning import APLModule, RefinementModule, SelfTrainingModule
from apl_lightning.denoisers import APL, BDL, CBST, CRST, DPL, IAST, UPL, Chebyshev, Denoiser, MRNet, Threshold
from apl_lightning.losses import mean_over_heads, weighted_dice_loss
from apl_lightning.presets import PAPER

COUNTED = {"ignore_small_components": False}
ONCE = 10**6  # as `every_n_epochs`: labels only before the first epoch
AS_PUBLISHED = {"guard": "warn", "patience": None}
EXTRAS = {"dice_weight": 1.0, "dropout": False, "ema_decay": 0.95, "learning_rate": 6e-4}


@dataclass(frozen=True)
class OtherAPL(APL):
    """APL with soft labels, or with weights of 1."""

    soft: bool = False
    weighted: bool = True

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, *S), or soft ones (B, C, *S), and weights (B, *S)."""
        labels, margins = super().__call__(p_main, p_aux)
        return (p_main + p_aux) / 2 if self.soft else labels, margins if self.weighted else torch.ones_like(margins)


class DiceAPL(APL):
    """APL with a Dice loss whose weights are those of the cross-entropy, not balanced."""

    def loss(self, main: Tensor, aux: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The sum of both losses, averaged over both heads."""
        dice = mean_over_heads(lambda logits: weighted_dice_loss(logits, labels, weights), main, aux)
        return super().loss(main, aux, labels, weights) + dice


class Recipe(NamedTuple):
    """The module class and the options of module, callback and data module."""

    module: type[RefinementModule]
    options: dict[str, Any]
    callback: Callable[[], dict[str, Any]]
    data: dict[str, Any]


def _apl(options: dict[str, Any] | None = None, callback: dict[str, Any] | None = None, **data: Any) -> Recipe:
    return Recipe(APLModule, options or {}, (callback or {}).copy, data)


def _peer(make: Callable[[], Denoiser], module: dict[str, Any], **options: Any) -> Recipe:
    return Recipe(SelfTrainingModule, module, lambda: {"denoiser": make(), **options}, {})


def _rows(name: str, make: Callable[[], Denoiser], rate: dict[str, Any], **options: Any) -> dict[str, Recipe]:
    return {
        name: _peer(make, {"batch_norm": "frozen"}, **AS_PUBLISHED, **options),
        f"{name} + extras": _peer(make, EXTRAS, ignore_small_components=True, **options),
        f"{name}, own rate": _peer(make, {"batch_norm": "frozen", **rate}, **AS_PUBLISHED, **options),
    }


def _sgd(learning_rate: float) -> dict[str, Any]:
    return {"optimizer": partial(SGD, momentum=0.9, weight_decay=5e-4), "learning_rate": learning_rate}


def _adam(learning_rate: float, **options: Any) -> dict[str, Any]:
    return {"optimizer": partial(Adam, **options), "learning_rate": learning_rate}


PEERS = (
    _rows("threshold", lambda: Threshold(0.9), _adam(1e-4))
    | _rows("CBST", CBST, _sgd(5e-5))
    # A horizontal flip would turn a left kidney into a right one.
    | _rows("MRNet", lambda: MRNet(flips=()), _sgd(1e-4), every_n_epochs=ONCE)
    | _rows("IAST", IAST, _adam(3e-5))
    | _rows("DPL", DPL, _adam(2e-3, betas=(0.9, 0.99)), every_n_epochs=ONCE)
    # These networks never see rotations by 90 degrees in training: with the four published views no pixel is kept.
    | _rows("UPL, one view", lambda: UPL(views=1), _adam(1e-5))
)
RECIPES = PEERS | {
    "APL, L_Con only": _apl({"batch_norm": "frozen", "refinement_weight": 0.0}, COUNTED),
    "APL, paper settings": Recipe(
        APLModule, dict(PAPER.module), lambda: {**PAPER.callback, "guard": "warn"}, dict(PAPER.data)
    ),
    "APL, defaults": _apl(),
}
MORE = (
    _rows("pseudo labels", lambda: Threshold(0.0), _adam(1e-4))
    | _rows("BDL", BDL, _sgd(2.5e-4))
    | _rows("CRST", CRST, _sgd(5e-5))
    | _rows("UPL", UPL, _adam(1e-5))
    | _rows("Chebyshev", Chebyshev, _adam(1e-4))
    # The defaults of APL without one of their parts.
    | {
        "APL, small components counted": _apl(callback=COUNTED),
        "APL, no Dice loss": _apl({"dice_weight": 0.0}),
        "APL, dropout": _apl({"dropout": True}),
        "APL, no teacher": _apl({"ema_decay": None}),
        "APL, heads at the full rate": _apl({"head_rate": 1.0}),
        "APL, no L_Con": _apl({"consistency_weight": 0.0}),
        "APL, W none": _apl({"weighting": "none"}),
        "APL, W inverse": _apl({"weighting": "inverse"}),
        "APL, W product": _apl({"weighting": "product"}),
        "APL, weights of 1": _apl(callback={"denoiser": OtherAPL(weighted=False)}),
        "APL, soft labels": _apl(callback={"denoiser": OtherAPL(soft=True)}),
        "APL, soft labels, weights of 1": _apl(callback={"denoiser": OtherAPL(soft=True, weighted=False)}),
        "APL, Dice loss not balanced": _apl({"dice_weight": 0.0}, {"denoiser": DiceAPL()}),
        "APL, temperature 4": _apl(callback={"denoiser": APL(temperature=4.0)}),
        "APL, BatchNorm of the source": _apl({"batch_norm": "frozen"}),
        "APL, BatchNorm re-estimated": _apl({"batch_norm": "adapt"}),
        "APL, images unmoved": _apl(transform=None),
        "APL, new labels to the end": _apl(callback={"patience": None}),
    }
)

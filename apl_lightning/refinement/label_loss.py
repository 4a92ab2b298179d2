"""The loss on pseudo labels: that of the denoiser, and a Dice loss with balanced weights."""

from typing import Any

from torch import Tensor

from apl_lightning._support.lightning import LightningModule, attached_callbacks
from apl_lightning._support.resizing import resize_to
from apl_lightning.data import describe
from apl_lightning.denoisers import APL, Denoiser
from apl_lightning.heads import Logits
from apl_lightning.losses import balanced_weights, mean_over_heads, weighted_dice_loss


def check_labelled(batch: Any) -> None:
    """Raise a `TypeError` unless a batch has pseudo labels."""
    if not isinstance(batch, dict) or not {"image", "pseudo_label", "weight"} <= set(batch):
        raise TypeError(
            f"Expected batches with `image`, `pseudo_label` and `weight`, but got {describe(batch)}: train on a "
            "`TargetDataModule`, with `PseudoLabelCallback`."
        )


def label_loss(denoiser: Denoiser, logits: Logits, batch: dict[str, Tensor], dice_weight: float) -> Tensor:
    """The denoiser's loss of both heads on `pseudo_label` and `weight`, and `dice_weight` times the Dice loss.

    The Dice loss has balanced weights. Losses that also look at pixels of weight 0 do not see samples that only fill up
    the batch.
    """
    labels, weights = batch["pseudo_label"], batch["weight"]
    main, aux = (resize_to(z, weights) for z in logits)
    if "repeated" in batch and type(denoiser).loss is not Denoiser.loss:
        counted = ~batch["repeated"]
        loss = denoiser.loss(main[counted], aux[counted], labels[counted], weights[counted])
    else:
        loss = denoiser.loss(main, aux, labels, weights)
    if dice_weight:
        balanced = balanced_weights(labels, weights, main.shape[1])
        dice = mean_over_heads(lambda z: weighted_dice_loss(z, labels, balanced), main, aux)
        loss = loss + dice_weight * dice
    return loss


def denoiser_of(module: LightningModule) -> Denoiser:
    """The denoiser of the run's `PseudoLabelCallback`; `APL` outside a run."""
    found = (getattr(callback, "denoiser", None) for callback in attached_callbacks(module))
    return next((denoiser for denoiser in found if isinstance(denoiser, Denoiser)), APL())

"""The losses of APL, as functions of logits, labels and weights."""

from apl_lightning.losses.balance import balanced_weights
from apl_lightning.losses.consistency import Weighting, consistency_loss
from apl_lightning.losses.means import joint_mean, mean_over_heads
from apl_lightning.losses.probabilities import divergence_from_uniform, entropy
from apl_lightning.losses.weighted import weighted_cross_entropy, weighted_dice_loss

__all__ = [
    "Weighting",
    "balanced_weights",
    "consistency_loss",
    "divergence_from_uniform",
    "entropy",
    "joint_mean",
    "mean_over_heads",
    "weighted_cross_entropy",
    "weighted_dice_loss",
]

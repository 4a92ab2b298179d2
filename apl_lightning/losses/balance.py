"""Raise the weights of classes of which a network is less sure."""

import torch
from torch import Tensor

from apl_lightning._support.distributed import total
from apl_lightning._support.soft_labels import hard_labels

_LARGEST_RISE = 2.0  # or the few pixels of a class that the network hardly ever predicts would count as certain


def balanced_weights(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    r"""The weights of the Dice loss: those of each class rise until all classes have about the same mean weight.

    With the mean $\bar\omega_c$ of the positive weights of a class in the batch, of all ranks,

    $$\omega'_n = \min\left(1, \; r_{\hat y_n} \, \omega_n\right), \qquad
    r_c = \min\left(2, \; \frac{\max_k \bar\omega_k}{\bar\omega_c}\right) .$$

    A network is less sure of small organs than of the background. With the margins alone, pixels in which such an organ
    is missed count more in the Dice loss than those in which it is found, and it fades. Weights of 0 and 1 stay as they
    are. All ranks must call it.

    Args:
        labels: Class indices, (B, *S), or soft labels, (B, C, *S), of which the largest counts.
        weights: Weights in [0, 1], (B, *S).
        num_classes: The number of classes.

    Examples:
        >>> import torch
        >>> from apl_lightning.losses import balanced_weights
        >>> labels, weights = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1.0, 0.6, 0.3, 0.7, 0.0]])
        >>> balanced_weights(labels, weights, num_classes=2)  # means of 0.8 and 0.5
        tensor([[1.0000, 0.6000, 0.4800, 1.0000, 0.0000]])
    """
    labels = hard_labels(labels, weights)
    classes = torch.arange(num_classes, device=labels.device)
    is_class = labels.flatten(1)[:, None] == classes[:, None]
    flat = weights.flatten(1)[:, None]
    sums = torch.stack([(is_class * flat).sum(dim=(0, 2)), (is_class & (flat > 0)).sum(dim=(0, 2)).to(flat.dtype)])
    total_weight, pixels = total(sums)
    mean = total_weight / pixels.clamp_min(1)
    rise = torch.where(mean > 0, mean.max() / mean, 1).clamp_max(_LARGEST_RISE)
    labels = labels.long().clamp(0, num_classes - 1)  # the losses name those out of range
    return (weights * rise[labels]).clamp_max(1)

"""L_SSL: cross-entropy and Dice on labels of which each pixel has a weight."""

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning._support.distributed import total, world_size
from apl_lightning.losses.means import joint_mean
from apl_lightning.losses.probabilities import at_least_float32, probabilities


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    r"""The weighted mean of the cross-entropy over pixels (Eq. 4 of the paper).

    $$L_{SSL} = \frac{\sum_n \omega_n \left[-\log p_n(\hat y_n)\right]}{\sum_n \omega_n}$$

    Under `torch.distributed` both sums run over all ranks. Every rank returns its share, scaled so that the mean of the
    gradients over ranks, as DDP takes it, is the gradient of the quotient of the sums. All ranks must call it.

    Args:
        logits: (B, C, *S).
        labels: Class indices, (B, *S), or soft labels, (B, C, *S).
        weights: Non-negative weights, (B, *S); 0 ignores a pixel.

    Returns:
        A scalar in float32 or float64; 0, with a graph, if all weights are 0.

    Raises:
        ValueError: If the shapes do not match, or a label is outside 0..C-1 (on CPU; CUDA raises its own assertion).

    Examples:
        >>> import torch
        >>> from apl_lightning.losses import weighted_cross_entropy
        >>> logits = torch.zeros(1, 2, 3)
        >>> labels = torch.tensor([[0, 1, 1]])
        >>> loss = weighted_cross_entropy(logits, labels, torch.tensor([[1.0, 0.5, 0.0]]))
        >>> round(loss.item(), 4)  # log 2 for any weights
        0.6931
    """
    labels = _checked_labels(labels, logits, weights)
    return joint_mean(F.cross_entropy(at_least_float32(logits), labels, reduction="none"), weights)


def weighted_dice_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    r"""One minus the weighted soft Dice, averaged over classes (Drozdzal et al., 2016; V-Net's without squares).

    $$L_{Dice} = 1 - \frac{1}{|K|} \sum_{c \in K}
    \frac{2 \sum_n \omega_n p_{nc} y_{nc}}{\sum_n \omega_n (p_{nc} + y_{nc})}$$

    The sums run over the pixels of the batch, of all ranks; $K$ are the foreground classes that have a label with a
    positive weight there. Every rank returns the same value, whose gradient is scaled as in `weighted_cross_entropy`.
    All ranks must call it.

    Args:
        logits: (B, C, *S).
        labels: Class indices, (B, *S), or soft labels, (B, C, *S).
        weights: Non-negative weights, (B, *S); 0 ignores a pixel.

    Returns:
        A scalar in float32 or float64; 0, with a graph, without labelled foreground.

    Raises:
        ValueError: If the shapes do not match, or a label is outside 0..C-1 (on CPU; elsewhere it counts for no class).

    Examples:
        >>> import torch
        >>> from apl_lightning.losses import weighted_dice_loss
        >>> logits = torch.zeros(1, 2, 3)  # p = 1/2 everywhere
        >>> labels = torch.tensor([[0, 1, 1]])
        >>> loss = weighted_dice_loss(logits, labels, torch.tensor([[1.0, 0.5, 0.0]]))
        >>> round(loss.item(), 4)  # 1 - 2 * 0.25 / (0.75 + 0.5)
        0.6
    """
    labels = _checked_labels(labels, logits, weights)
    p, w = probabilities(logits).flatten(2), weights.flatten(1)[:, None]
    classes = torch.arange(p.shape[1], device=p.device)
    y = labels.flatten(2) if labels.is_floating_point() else labels.flatten(1)[:, None] == classes[:, None]
    sums = torch.stack([(w * part).sum(dim=(0, 2)).to(p.dtype) for part in (p * y, p, y)])
    both, predicted, labelled = _total_with_gradient(sums)
    has_labels = (labelled > 0) & (classes > 0)
    dice = 2 * both / torch.where(has_labels, predicted + labelled, 1)
    loss: Tensor = torch.where(has_labels, 1 - dice, 0 * dice).sum() / has_labels.sum().clamp_min(1)
    return loss


def _total_with_gradient(sums: Tensor) -> Tensor:
    """The sum over ranks; its gradient is that of this rank's share, scaled for the mean that DDP takes."""
    return total(sums.detach()) + world_size() * (sums - sums.detach())


def _checked_labels(labels: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    """Labels whose shape fits: class indices in int64, or soft ones as they are."""
    soft = labels.is_floating_point() and labels.shape == logits.shape
    if logits.shape[:1] + logits.shape[2:] != weights.shape or not (soft or labels.shape == weights.shape):
        raise ValueError(
            "Expected `logits` (B, C, *S), `labels` (B, *S) or (B, C, *S) and `weights` (B, *S), but got "
            f"{tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(weights.shape)}."
        )
    if soft:
        return labels
    _check_range(labels, logits.shape[1])
    return labels.long()


def _check_range(labels: Tensor, classes: int) -> None:
    # Reading values synchronises with a GPU and breaks a compiled graph.
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"Expected `labels` between 0 and {classes - 1}, but got values from {low} to {high}: check `num_classes`."
        )

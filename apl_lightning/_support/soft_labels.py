"""Labels are class indices (B, *S) or soft (B, C, *S): the weights beside them show which."""

from torch import Tensor


def is_soft(labels: Tensor, weights: Tensor) -> bool:
    """Whether labels have a class dimension, given their weights (B, *S) or, of one sample, (*S)."""
    return labels.ndim > weights.ndim


def hard_labels(labels: Tensor, weights: Tensor) -> Tensor:
    """Class indices (B, *S) of hard or soft labels, given their weights (B, *S)."""
    return labels.max(dim=1).indices if is_soft(labels, weights) else labels

"""The two losses of APL: pure functions of logits, labels and weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning.ranks import total, world_size

Weighting = Literal["confusion", "none", "inverse", "product"]


def consistency_loss(
    main_logits: Tensor,
    aux_logits: Tensor,
    weighting: Weighting = "confusion",
    image_weights: Tensor | None = None,
) -> Tensor:
    r"""How much the two heads disagree, counted by pairs of classes (Eq. 1 and 2 of the paper).

    Per image, with the $C \times N$ probabilities $p_m$ and $p_a$ of the two heads,

    $$L_{Con} = \sum_{i \ne j} W_{ij} A_{ij}, \qquad A = \frac{1}{N} p_m p_a^\top ,$$

    where $A$ is the soft confusion matrix between the heads and $W$ weights the pairs of classes, without gradient.

    Args:
        main_logits: Logits of D_m, (B, C, *S).
        aux_logits: Logits of D_a, (B, C, *S).
        weighting: The reading of W.

            - `"confusion"`: $W_{ij}$ is the number of pixels that D_m gives to class i and D_a to class j, divided by
              the number of all, and multiplies $A_{ij}$ element by element. The class pairs that the heads really
              confuse count most. This is closest to the text.
            - `"none"`: W = 1; then the loss is the mean over pixels of $1 - \langle p_m, p_a \rangle$.
            - `"inverse"`: $W_{ij}$ is 1 / (1 + that number), summing to 1: rare pairs count most.
            - `"product"`: the literal matrix product $R = W p_m p_a^\top / N$ with the confusion counts as W, and
              $L_{Con} = \sum_{i \ne j} R_{ij}$.
        image_weights: One weight an image, (B,); 0 ignores it, and all ranks together have one mean. All ranks must
            give them, or none.

    Returns:
        The mean over images, a scalar in float32 at least.

    Raises:
        ValueError: If the shapes do not fit or `weighting` is unknown.

    Examples:
        >>> import torch
        >>> from apl_lightning.losses import consistency_loss
        >>> sure = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]])  # one image, two classes, two pixels
        >>> round(consistency_loss(sure, sure).item(), 4)
        0.0
        >>> round(consistency_loss(sure, sure.flip(1), weighting="none").item(), 4)
        1.0
    """
    if main_logits.shape != aux_logits.shape or main_logits.ndim < 3:
        raise ValueError(
            "Expected `main_logits` and `aux_logits` of one shape (B, C, *S), but got "
            f"{tuple(main_logits.shape)} and {tuple(aux_logits.shape)}."
        )
    if weighting not in get_args(Weighting):
        raise ValueError(f"Expected `weighting` to be one of {get_args(Weighting)}, but got {weighting!r}.")
    p_main, p_aux = (_probabilities(logits).flatten(2) for logits in (main_logits, aux_logits))
    per_image = _disagreement(p_main, p_aux, weighting)
    return per_image.mean() if image_weights is None else joint_mean(per_image, image_weights)


def _disagreement(p_main: Tensor, p_aux: Tensor, weighting: Weighting) -> Tensor:
    """L_Con of each image, (B,), from two (B, C, N)."""
    if weighting == "none":
        return 1 - (p_main * p_aux).sum(dim=1).mean(dim=1)
    relevance = p_main @ p_aux.transpose(1, 2) / p_main.shape[2]
    weight = _confusion_counts(p_main, p_aux)
    if weighting == "inverse":
        weight = 1 / (1 + weight)
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    weighted = weight @ relevance if weighting == "product" else weight * relevance
    return weighted.sum(dim=(1, 2)) - weighted.diagonal(dim1=1, dim2=2).sum(dim=1)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    r"""Cross-entropy as a weighted mean over pixels (Eq. 4 of the paper).

    $$L_{SSL} = \frac{\sum_n \omega_n \left[-\log p_n(\hat y_n)\right]}{\sum_n \omega_n}$$

    Under `torch.distributed` both sums run over all ranks: every rank returns its share, scaled so that the mean of
    the gradients over ranks, which DDP takes, is the gradient of the joint quotient. All ranks must call it.

    Args:
        logits: (B, C, *S).
        labels: Class indices, (B, *S), or soft labels, (B, C, *S).
        weights: Non-negative weights, (B, *S); 0 ignores a pixel.

    Returns:
        A scalar in float32 at least; 0 with a graph if no weight is left.

    Raises:
        ValueError: If the shapes do not fit, or a label is outside 0..C-1 (on CPU; CUDA raises an assertion of its
            own).

    Examples:
        >>> import torch
        >>> from apl_lightning.losses import weighted_cross_entropy
        >>> logits = torch.zeros(1, 2, 3)
        >>> labels = torch.tensor([[0, 1, 1]])
        >>> loss = weighted_cross_entropy(logits, labels, torch.tensor([[1.0, 0.5, 0.0]]))
        >>> round(loss.item(), 4)  # log 2, whatever the weights
        0.6931
    """
    soft = labels.is_floating_point() and labels.shape == logits.shape
    if logits.shape[:1] + logits.shape[2:] != weights.shape or not (soft or labels.shape == weights.shape):
        raise ValueError(
            "Expected `logits` (B, C, *S), `labels` (B, *S) or (B, C, *S) and `weights` (B, *S), but got "
            f"{tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(weights.shape)}."
        )
    if not soft:
        _check_labels(labels, logits.shape[1])
        labels = labels.long()
    logits = _at_least_float32(logits)
    return joint_mean(F.cross_entropy(logits, labels, reduction="none"), weights)


def joint_mean(values: Tensor, weights: Tensor) -> Tensor:
    """This rank's share of the weighted mean over all ranks; DDP's mean of the gradients makes it whole."""
    weights = weights.to(values.dtype)
    mean_weight = total(weights.sum().detach()) / world_size()
    return (weights * values).sum() / torch.where(mean_weight > 0, mean_weight, 1)


def entropy(logits: Tensor) -> Tensor:
    r"""$-\sum_c p_c \log p_c$ of each pixel, (B, *S), from logits (B, C, *S)."""
    log_p = _at_least_float32(logits).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def _check_labels(labels: Tensor, classes: int) -> None:
    # Looking at values would wait for a GPU and break a compiled graph.
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"Expected `labels` between 0 and {classes - 1}, but got values from {low} to {high}: check `num_classes`."
        )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _probabilities(logits: Tensor) -> Tensor:
    return _at_least_float32(logits).softmax(dim=1)


def _confusion_counts(p_main: Tensor, p_aux: Tensor) -> Tensor:
    """Per image, how many pixels the heads give to each pair of classes: (B, C, C) from two (B, C, N)."""
    batch, classes, _ = p_main.shape
    with torch.no_grad():
        # On CPU, `max` over the classes is ten times faster than `argmax`.
        pairs = p_main.max(dim=1).indices * classes + p_aux.max(dim=1).indices
        counts = torch.zeros(batch, classes * classes, dtype=torch.long, device=pairs.device)
        counts.scatter_add_(1, pairs, torch.ones_like(pairs))
        return counts.view(batch, classes, classes).to(p_main.dtype)

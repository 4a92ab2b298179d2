"""The losses of APL, as functions of logits, labels and weights."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning._support.distributed import total, world_size

Weighting = Literal["confusion", "none", "inverse", "product"]


def consistency_loss(
    main_logits: Tensor,
    aux_logits: Tensor,
    weighting: Weighting = "confusion",
    image_weights: Tensor | None = None,
) -> Tensor:
    r"""The disagreement of the two heads, weighted by pairs of classes (Eq. 1 and 2 of the paper).

    Per image, with the $C \times N$ probabilities $p_m$ and $p_a$ of the two heads,

    $$L_{Con} = \sum_{i \ne j} W_{ij} A_{ij}, \qquad A = \frac{1}{N} p_m p_a^\top ,$$

    where $A$ is the soft confusion matrix between the heads, and $W$ weights the pairs of classes (no gradient).

    Args:
        main_logits: Logits of D_m, (B, C, *S).
        aux_logits: Logits of D_a, (B, C, *S).
        weighting: The definition of W; the paper leaves it open.

            - `"confusion"`: $W_{ij}$ is the share of pixels with argmax i in D_m and argmax j in D_a, multiplied with
              $A_{ij}$ element by element. Class pairs that the heads confuse often count most. This is closest to the
              text of the paper.
            - `"none"`: W = 1; then the loss is the mean over pixels of $1 - \langle p_m, p_a \rangle$.
            - `"inverse"`: $W_{ij}$ is 1 / (1 + number of pixels), normalised to sum 1. Rare pairs count most.
            - `"product"`: the literal matrix product $R = W p_m p_a^\top / N$ with the confusion counts as W, and
              $L_{Con} = \sum_{i \ne j} R_{ij}$.
        image_weights: Weights of the images, (B,); 0 ignores an image. The mean is then taken over all ranks, so all
            ranks must pass weights, or none.

    Returns:
        The mean over images, a scalar in float32 or float64.

    Raises:
        ValueError: If the shapes do not match or `weighting` is unknown.

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
    with torch.autocast(p_main.device.type, enabled=False):  # sums over pixels overflow in float16
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
    return joint_mean(F.cross_entropy(_at_least_float32(logits), labels, reduction="none"), weights)


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
        ValueError: As `weighted_cross_entropy`.

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
    p, w = _probabilities(logits).flatten(2), weights.flatten(1)[:, None]
    classes = torch.arange(p.shape[1], device=p.device)
    y = labels.flatten(2) if labels.is_floating_point() else labels.flatten(1)[:, None] == classes[:, None]
    sums = torch.stack([(w * part).sum(dim=(0, 2)).to(p.dtype) for part in (p * y, p, y)])
    both, predicted, labelled = _total_with_gradient(sums)
    has_labels = (labelled > 0) & (classes > 0)
    dice = 2 * both / torch.where(has_labels, predicted + labelled, 1)
    loss: Tensor = torch.where(has_labels, 1 - dice, 0 * dice).sum() / has_labels.sum().clamp_min(1)
    return loss


def joint_mean(values: Tensor, weights: Tensor) -> Tensor:
    """This rank's share of the weighted mean over all ranks, scaled for the mean of gradients that DDP takes."""
    weights = weights.to(values.dtype)
    mean_weight = total(weights.sum().detach()) / world_size()
    return (weights * values).sum() / torch.where(mean_weight > 0, mean_weight, 1)


def _total_with_gradient(sums: Tensor) -> Tensor:
    """The sum over ranks; its gradient is that of this rank's share, scaled for the mean that DDP takes."""
    return total(sums.detach()) + world_size() * (sums - sums.detach())


def mean_over_heads(loss: Callable[[Tensor], Tensor], main: Tensor, aux: Tensor) -> Tensor:
    """The mean of a loss of logits over both heads."""
    return torch.stack([loss(main), loss(aux)]).mean()


def entropy(logits: Tensor) -> Tensor:
    r"""The entropy $-\sum_c p_c \log p_c$ of each pixel, (B, *S), from logits (B, C, *S)."""
    log_p = _at_least_float32(logits).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


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


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _probabilities(logits: Tensor) -> Tensor:
    return _at_least_float32(logits).softmax(dim=1)


def _confusion_counts(p_main: Tensor, p_aux: Tensor) -> Tensor:
    """Per image, the number of pixels with each pair of predicted classes: (B, C, C) from two (B, C, N)."""
    batch, classes, _ = p_main.shape
    with torch.no_grad():
        # On CPU, `max` over the classes is ten times faster than `argmax`.
        pairs = p_main.max(dim=1).indices * classes + p_aux.max(dim=1).indices
        counts = torch.zeros(batch, classes * classes, dtype=torch.long, device=pairs.device)
        counts.scatter_add_(1, pairs, torch.ones_like(pairs))
        return counts.view(batch, classes, classes).to(p_main.dtype)

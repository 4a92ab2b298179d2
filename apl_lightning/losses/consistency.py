"""L_Con: the heads learn to agree."""

from typing import Literal, get_args

import torch
from torch import Tensor

from apl_lightning.losses.means import joint_mean
from apl_lightning.losses.probabilities import probabilities

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
            - `"product"`: the literal matrix product $R = W p_m p_a^\top / N$ with the same shares as W, and
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
    p_main, p_aux = (probabilities(logits).flatten(2) for logits in (main_logits, aux_logits))
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


def _confusion_counts(p_main: Tensor, p_aux: Tensor) -> Tensor:
    """Per image, the number of pixels with each pair of predicted classes: (B, C, C) from two (B, C, N)."""
    batch, classes, _ = p_main.shape
    with torch.no_grad():
        # On CPU, `max` over the classes is ten times faster than `argmax`.
        pairs = p_main.max(dim=1).indices * classes + p_aux.max(dim=1).indices
        counts = torch.zeros(batch, classes * classes, dtype=torch.long, device=pairs.device)
        counts.scatter_add_(1, pairs, torch.ones_like(pairs))
        return counts.view(batch, classes, classes).to(p_main.dtype)

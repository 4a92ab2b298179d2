"""Mean and variance of the predictions over passes with dropout."""

import torch
from torch import Tensor

from apl_lightning.denoisers.confidence import merge
from apl_lightning.denoisers.predictor import Predictor


def over_passes(
    predictor: Predictor, images: Tensor, passes: int, rate: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The mean probabilities of both heads, (B, C, *S), and the variance of $p_{\hat y}$ over the passes, (B, *S).

    The variance (with K - 1, as of `torch.std`) is that of the merged probabilities after they are softened with
    `temperature`; the label is the argmax of their mean before. The sums are updated pass by pass (Welford, 1962), so
    the memory does not grow with `passes`.
    """
    p_main, p_aux, mean = _one_pass(predictor, images, rate, temperature)
    squares = torch.zeros_like(mean)
    for count in range(2, passes + 1):
        main, aux, softened = _one_pass(predictor, images, rate, temperature)
        p_main.lerp_(main, 1 / count)
        p_aux.lerp_(aux, 1 / count)
        change = softened - mean
        mean.add_(change / count)
        squares.add_(change * (softened - mean))
    labels = merge(p_main, p_aux).max(dim=1).indices
    return p_main, p_aux, squares.gather(1, labels[:, None])[:, 0] / (passes - 1)


def _one_pass(predictor: Predictor, images: Tensor, rate: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    main, aux = predictor.with_dropout(images, rate)
    softened = merge((main / temperature).softmax(dim=1), (aux / temperature).softmax(dim=1))
    return main.softmax(dim=1), aux.softmax(dim=1), softened

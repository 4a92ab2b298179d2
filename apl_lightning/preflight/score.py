"""How well images suit a network, without labels and without the source images."""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apl_lightning._support.modes import hooked
from apl_lightning.losses import entropy

_LEAST = 1e-8
_FEW = 1e-3  # of the pixels: with less foreground a network is not sure of anything


class Likeness(NamedTuple):
    """How like the features of images are to those of training, see `RunningStatistics`: means over layers."""

    all: float
    late: float  # over the second half


class Score(NamedTuple):
    """What a network makes of some images under a view.

    Attributes:
        sureness: Of its foreground, see [`sureness`][apl_lightning.preflight.sureness].
        likeness: Of its features to those it was trained with, see
            [`RunningStatistics`][apl_lightning.preflight.RunningStatistics]; `None` if it has no such layer.
    """

    sureness: float
    likeness: Likeness | None


def count_foreground(logits: Tensor) -> Tensor:
    """The entropy in nats and the pixels of each predicted foreground class, and all pixels: (3, K), added over images.

    Args:
        logits: (B, K + 1, *S), with the background at 0.
    """
    uncertainty, labels = entropy(logits), logits.max(dim=1).indices
    of_class = [labels == label for label in range(1, logits.shape[1])]
    entropies = torch.stack([uncertainty[mask].sum() for mask in of_class])
    pixels = torch.stack([mask.sum() for mask in of_class])
    return torch.stack([entropies, pixels, torch.full_like(entropies, labels.numel())])


def sureness(counted: Tensor) -> Tensor:
    r"""How sure a network is of its foreground: of all of it, and on average of each class.

    $$ S = S(\hat y \neq 0, \epsilon) + \frac{1}{K} \sum_{c=1}^{K} S(\hat y = c, \epsilon / K), \qquad
    S(A, \epsilon) = -\log \frac{\sum_{i \in A} H(p_i) + \epsilon N}{|A| + \epsilon N} $$

    H is the entropy of the class probabilities of a pixel in nats, N the number of pixels, K that of the foreground
    classes, and epsilon 0.001. It is 0 for a network that finds nothing, however sure it is of the background.

    Args:
        counted: The entropy and the pixels of each predicted foreground class, and all pixels, (3, K).

    Examples:
        >>> import torch
        >>> from apl_lightning.preflight import sureness
        >>> sureness(torch.tensor([[0.0], [0.0], [1000.0]]))  # all background
        tensor(0.)
        >>> sureness(torch.tensor([[19.0], [99.0], [1000.0]]))  # 0.2 nats a pixel, twice
        tensor(3.2189)
    """
    entropies, found, pixels = counted
    few = _FEW * pixels
    whole = ((found.sum() + few[0]) / (entropies.sum() + few[0])).log()
    each = ((found + few / len(few)) / (entropies + few / len(few))).log()
    total: Tensor = whole + each.mean()
    return total


class RunningStatistics:
    r"""How like the features of images are to those that a network was trained with.

    BatchNorm layers keep the running mean m and variance v of their inputs in training. With the mean and variance of
    C channels on these images, a layer says

    $$ -\log \frac{1}{C} \sum_c \mathrm{KL}\left(\mathcal{N}(\mu_c, \sigma^2_c) \| \mathcal{N}(m_c, v_c)\right) $$

    The first layers see intensities and edges, the later ones shapes and how they lie.

    Args:
        network: Any network; it may have no such layer.
    """

    def __init__(self, network: nn.Module) -> None:
        layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
        self._layers = [layer for layer in layers if layer.running_mean is not None]
        self._sums: dict[nn.Module, Tensor] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect the statistics of the forward passes in the block, from nothing."""
        self._sums = {}
        with hooked(*self._layers, pre=self._collect):
            yield

    def likeness(self) -> Likeness | None:
        """The likeness of the collected features; `None` without such a layer."""
        layers = [_likeness(layer, sums) for layer, sums in self._sums.items()]  # in the order of the forward pass
        return Likeness(mean(layers), mean(layers[len(layers) // 2 :])) if layers else None

    def _collect(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().float().movedim(1, 0).flatten(1)
        count = torch.full_like(values[:, 0], values.shape[1])
        sums = torch.stack([count, values.sum(dim=1), values.square().sum(dim=1)]).cpu().double()
        self._sums[layer] = self._sums.get(layer, torch.zeros_like(sums)) + sums


def _likeness(layer: Any, sums: Tensor) -> float:
    count, total, squares = sums
    centre = total / count
    variance = (squares / count - centre**2).clamp_min(_LEAST)
    expected, running = layer.running_var.cpu().double().clamp_min(_LEAST), layer.running_mean.cpu().double()
    distance = (expected / variance).log() + (variance + (centre - running) ** 2) / expected - 1
    return -float((distance.mean() / 2).clamp_min(_LEAST).log())

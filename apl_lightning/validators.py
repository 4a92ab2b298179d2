"""How good a network is on images without labels: two figures that can be had from its predictions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from apl_lightning.ranks import total_of_counts

_PIXELS = 1024  # of an image, for the entropies
_NEIGHBOURS = 256  # of an image, for the densities
_TEMPERATURE = 0.05


class LabelFreeValidators:
    r"""Information maximisation and soft neighbourhood density, over a data set and all ranks.

    - IM is the diversity of the predictions minus their uncertainty, $H(\bar p) - \overline{H(p)}$ (as in Liang et al.,
      "Do We Really Need to Access the Source Data?", ICML 2020): high where pixels are sure and classes are many.
    - SND is the entropy of how alike a pixel is to the others of its image (Saito et al., "Tune it the Right Way",
      ICCV 2021): with the similarities $s_{ij}$ of the predictions of length 1, the mean over i of the entropy of
      $\mathrm{softmax}_j(s_{ij} / 0.05)$, j ≠ i. High where predictions form dense clusters.

    Both look at evenly spaced pixels of each image (1024 and 256).

    Args:
        num_classes: Number of classes.

    Examples:
        >>> import torch
        >>> from apl_lightning.validators import LabelFreeValidators
        >>> validators = LabelFreeValidators(2)
        >>> validators.update(torch.eye(2).repeat(1, 50)[None])  # sure, and both classes alike
        >>> figures = validators.compute(torch.device("cpu"))
        >>> {name: round(value, 3) for name, value in figures.items()}  # log 2, and log 49
        {'im': 0.693, 'snd': 3.892}
    """

    def __init__(self, num_classes: int) -> None:
        self._sums = torch.zeros(num_classes + 4, dtype=torch.float64)  # p of each class, H(p), pixels, SND, images

    def update(self, probabilities: Tensor) -> None:
        """Count a batch of (B, C, *S)."""
        flat = probabilities.flatten(2)
        some = _evenly(flat, _PIXELS)
        entropy = -torch.special.xlogy(some, some).sum()
        pixels = some.shape[0] * some.shape[2]
        density = _density(_evenly(flat, _NEIGHBOURS))
        counts = torch.tensor([float(entropy), pixels, float(density.sum()), len(flat)])
        self._sums += torch.cat([some.sum(dim=(0, 2)).double().cpu(), counts.double()])

    def compute(self, device: torch.device) -> dict[str, float]:
        """`im` and `snd` in nats; a collective on `device`."""
        sums = total_of_counts(self._sums, device)
        entropy, pixels, density, images = sums[-4:].tolist()
        mean = sums[:-4] / pixels
        diversity = float(-torch.special.xlogy(mean, mean).sum())
        return {"im": diversity - entropy / pixels, "snd": density / images}


def _evenly(flat: Tensor, count: int) -> Tensor:
    """About so many pixels of (B, C, N), evenly spaced by a step that falls into no rows."""
    return flat[..., :: max(1, flat.shape[2] // count) | 1]


def _density(flat: Tensor) -> Tensor:
    """Soft neighbourhood density of each image, (B,), from (B, C, N)."""
    vectors = torch.nn.functional.normalize(flat, dim=1)
    similarity = vectors.transpose(1, 2) @ vectors / _TEMPERATURE
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    neighbours = similarity.softmax(dim=2)
    entropy: Tensor = -torch.special.xlogy(neighbours, neighbours).sum(dim=2)
    return entropy.mean(dim=1)

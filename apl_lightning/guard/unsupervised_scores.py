"""Scores of a network on images without labels, from its predictions alone."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning._support.distributed import total_of_counts
from apl_lightning.denoisers import merge

_ENTROPY_PIXELS = 1024
_DENSITY_PIXELS = 256
_TEMPERATURE = 0.05


class UnsupervisedScores:
    r"""Class ratios, agreement of the heads, information maximisation and soft neighbourhood density.

    - `pseudo/class_ratio/<class>` is the share of pixels whose merged prediction is this class (in the log: the label).
    - `pseudo/agreement` is the share of pixels where both heads predict the same class.
    - `pseudo/im` is the diversity of the predictions minus their uncertainty, $H(\bar p) - \overline{H(p)}$ (Liang et
      al., "Do We Really Need to Access the Source Data?", ICML 2020): high for confident predictions of many classes.
    - `pseudo/snd` measures how similar a pixel is to the others of its image (Saito et al., "Tune it the Right Way",
      ICCV 2021): with the cosine similarities $s_{ij}$ of the predictions, the mean over i of the entropy of
      $\mathrm{softmax}_j(s_{ij} / 0.05)$, j ≠ i. High for predictions in dense clusters.

    The last two use evenly spaced pixels of the merged prediction (1024 and 256 per image) and are in nats.

    Args:
        class_names: Names of the classes, background included.

    Examples:
        >>> import torch
        >>> from apl_lightning.guard import UnsupervisedScores
        >>> scores = UnsupervisedScores(["background", "spleen"])
        >>> p = torch.eye(2).repeat(1, 50)[None]  # one image: confident, and each class on half of the pixels
        >>> scores.update(p, p)
        >>> computed = scores.compute(torch.device("cpu"))
        >>> [round(computed[f"pseudo/{name}"], 3) for name in ("im", "snd", "class_ratio/spleen")]  # log 2, log 49, 1/2
        [0.693, 3.892, 0.5]
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = list(class_names)
        classes = len(self._names)
        # Sums of p of each class, H(p), pixels; of SND, images; of all pixels, agreeing ones.
        self._sums = torch.zeros(classes + 6, dtype=torch.float64)
        self._counts = torch.zeros(classes, dtype=torch.long)

    def update(self, p_main: Tensor, p_aux: Tensor) -> None:
        """Count the probabilities of both heads for a batch, (B, C, *S) each."""
        merged = merge(p_main, p_aux)
        agree = p_main.max(dim=1).indices == p_aux.max(dim=1).indices
        labels = merged.max(dim=1).indices.flatten()
        self._counts += torch.bincount(labels, minlength=len(self._names)).cpu()
        flat = merged.flatten(2)
        some = _evenly_spaced(flat, _ENTROPY_PIXELS)
        entropy = -torch.special.xlogy(some, some).sum()
        density = _density(_evenly_spaced(flat, _DENSITY_PIXELS)).sum()
        sums = [float(entropy), some[:, 0].numel(), float(density), len(flat), agree.numel(), int(agree.sum())]
        self._sums += torch.cat([some.sum(dim=(0, 2)).double().cpu(), torch.tensor(sums, dtype=torch.float64)])

    def compute(self, device: torch.device) -> dict[str, float]:
        """The scores over all ranks; a collective on `device`."""
        sums = total_of_counts(torch.cat([self._sums, self._counts.double()]), device)
        classes = len(self._names)
        entropy, some, density, images, pixels, agreeing = sums[classes : classes + 6].tolist()
        mean = sums[:classes] / some
        diversity = float(-torch.special.xlogy(mean, mean).sum())
        scores = {"agreement": agreeing / pixels, "im": diversity - entropy / some, "snd": density / images}
        ratios = sums[classes + 6 :] / pixels
        scores |= {f"class_ratio/{name}": float(ratio) for name, ratio in zip(self._names, ratios, strict=True)}
        return {f"pseudo/{name}": score for name, score in scores.items()}


def _evenly_spaced(flat: Tensor, count: int) -> Tensor:
    """About `count` pixels of (B, C, N); an odd step does not repeat the columns of an image."""
    return flat[..., :: max(1, flat.shape[2] // count) | 1]


def _density(flat: Tensor) -> Tensor:
    """Soft neighbourhood density of each image, (B,), from (B, C, N)."""
    vectors = F.normalize(flat, dim=1)
    similarity = vectors.transpose(1, 2) @ vectors / _TEMPERATURE
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    neighbours = similarity.softmax(dim=2)
    entropy: Tensor = -torch.special.xlogy(neighbours, neighbours).sum(dim=2)
    return entropy.mean(dim=1)

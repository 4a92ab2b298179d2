"""Estimate without labels which of two networks is better: a classifier of single pixels judges where they differ."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning._support.seeding import seeded
from apl_lightning.metrics import dice_of, overlap_counts

_HIDDEN = 64
_PER_CLASS = 6000
_BATCH = 1024
_EPOCHS = 5
_PRIOR = 0.4
_FEWEST = 20  # pixels of a class from which a classifier can learn it


def second_opinion(features: Tensor, folds: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Classify single pixels by what a network predicts for similar pixels of other images.

    A small perceptron learns the labels of a network from features of single pixels (intensities and position). Errors
    of the network that do not depend on these look like noise to it. The classifier for the pixels of one fold is
    trained on the other folds, on equally many pixels of each class. Then 0.4 times the logarithm of the share of a
    class is added to its logit: with equal priors small organs may spread, with their shares as priors they may vanish.

    Args:
        features: Features of pixels, (N, F).
        folds: The number of the fold of each pixel, (N,).
        labels: The classes that the network predicts, (N,).
        num_classes: The number of classes, background (class 0) included.

    Returns:
        Logits, (N, C); negative infinity for a class with fewer than 20 pixels in the other folds.
    """
    features = _standardised(features)
    logits = torch.full((len(features), num_classes), -torch.inf)
    for fold in folds.unique():
        learnt, judged = folds != fold, folds == fold
        counts = torch.bincount(labels[learnt].long(), minlength=num_classes)
        known = (counts >= _FEWEST).nonzero()[:, 0]
        if len(known):
            found = _classify(features[learnt], labels[learnt].long(), known, features[judged])
            prior = _PRIOR * (counts[known] / counts.sum()).log()
            logits[judged.nonzero(), known] = found + prior
    return logits


def estimate_gain(opinion: Tensor, before: Tensor, after: Tensor) -> Tensor:
    r"""Estimate by how much the Dice of each foreground class differs between two networks, without labels.

    Where the networks agree, they count as right. Where they differ, the one whose class has the higher logit in the
    [`second_opinion`][apl_lightning.guard.second_opinion] does, and the first one if either is negative infinity.
    Let $P_c$ and $Q_c$ be the pixels that the networks call c, and $T_c$ those that are c in this sense. Then

    $$g_c = \frac{2 |Q_c \cap T_c|}{|Q_c| + |T_c|} - \frac{2 |P_c \cap T_c|}{|P_c| + |T_c|} .$$

    Args:
        opinion: The logits of the second opinion, (N, C).
        before: The classes that the first network predicts, (N,).
        after: The classes that the second network predicts, (N,).

    Returns:
        $g_c$ of the foreground classes, (C - 1,); NaN for a class that no network predicts.

    Examples:
        >>> import torch
        >>> from apl_lightning.guard import estimate_gain, second_opinion
        >>> intensity = torch.linspace(0, 1, 4000)[:, None]  # an organ is brighter than 0.5
        >>> folds, truth = torch.arange(4000) % 2, (intensity[:, 0] > 0.5).long()
        >>> worse = truth * (torch.arange(4000) % 10 > 4)  # misses half of it, anywhere
        >>> opinion = second_opinion(intensity, folds, worse, num_classes=2)
        >>> estimate_gain(opinion, worse, truth).item() > 0.1  # it rises from 0.67 to 1
        True
    """
    num_classes = opinion.shape[1]
    before, after = before.long(), after.long()
    of_before, of_after = (opinion.gather(1, labels[:, None])[:, 0] for labels in (before, after))
    # A class that the other folds lack is unknown, not unlikely: what fades there must not count as a gain.
    right = torch.where((of_after > of_before) & of_before.isfinite(), after, before)
    earlier, later = (dice_of(overlap_counts(labels, right, num_classes)).nan_to_num(0) for labels in (before, after))
    is_predicted = torch.bincount(torch.cat([before, after]), minlength=num_classes) > 0
    return (later - earlier).where(is_predicted, torch.nan)[1:]


def _standardised(features: Tensor) -> Tensor:
    """Features of mean 0 and standard deviation 1, without outliers: one enormous pixel would hide all others."""
    features = features.float().nan_to_num()
    limits = torch.quantile(features, torch.tensor([0.001, 0.999], dtype=features.dtype), dim=0)
    features = features.clamp(limits[0], limits[1])
    deviation = features.std(dim=0)
    return (features - features.mean(dim=0)) / deviation.where(deviation > 0, 1)


def _classify(features: Tensor, labels: Tensor, known: Tensor, judged: Tensor) -> Tensor:
    """Logits of `judged` (N, F) for the known classes."""
    with seeded(0), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        places = [(labels == number).nonzero()[:, 0] for number in known]
        count = min(_PER_CLASS, len(features))
        drawn = torch.cat([of_class[torch.randint(len(of_class), (count,))] for of_class in places])
        inputs, classes = features[drawn], torch.searchsorted(known, labels[drawn])
        network = nn.Sequential(
            nn.Linear(inputs.shape[1], _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, len(known)),
        ).float()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
        for _ in range(math.ceil(_EPOCHS * len(inputs) / _BATCH)):
            some = torch.randint(len(inputs), (_BATCH,))
            loss = F.cross_entropy(network(inputs[some]), classes[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return torch.cat([network(part) for part in judged.split(2**16)])

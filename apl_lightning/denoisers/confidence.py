"""Confidence of predictions as logits, which do not saturate."""

import torch
from torch import Tensor

STEPS = 256  # per logit, in which confidences are kept
_MOST = 2**15 - 1  # of a 16-bit integer


def merge(p_main: Tensor, p_aux: Tensor) -> Tensor:
    """The mean of the probabilities of both heads, (B, C, *S)."""
    return (p_main + p_aux) / 2


def predicted(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable class and the logit of its probability, log p / (1 - p), each (B, *S).

    1 - p is computed as the sum of the other probabilities: in float32, p itself is 1 from a logit of 17 on.
    """
    top, labels = probabilities.max(dim=1)
    others = probabilities.scatter(1, labels[:, None], 0).sum(dim=1)
    return labels, top.log() - others.clamp_min(torch.finfo(others.dtype).tiny).log()


def class_logits(probabilities: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
    """The logits of all class probabilities, (B, C, *S); `labels` and `confidence` come from `predicted`."""
    logits = probabilities.logit(torch.finfo(probabilities.dtype).tiny)
    return logits.scatter_(1, labels[:, None], confidence[:, None].to(logits.dtype))


def to_steps(logits: Tensor) -> Tensor:
    """Logits in whole steps of 1/256, as 16-bit integers: even, unlike half precision, in the same memory."""
    return (logits * STEPS).round().clamp(-_MOST, _MOST).to(torch.int16)


def of_steps(steps: Tensor) -> Tensor:
    """The logits of `to_steps`."""
    return steps.float() / STEPS


def logit(probability: float) -> float:
    """The logit of a probability between 0 and 1."""
    return float(torch.tensor(probability, dtype=torch.float64).logit())

"""Probabilities, their entropy and their divergence from uniform ones, in float32 or float64 under any precision."""

import torch
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float64 as they are, others in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def probabilities(logits: Tensor) -> Tensor:
    """The probabilities of each pixel, (B, C, *S), from logits (B, C, *S)."""
    return at_least_float32(logits).softmax(dim=1)


def entropy(logits: Tensor) -> Tensor:
    r"""The entropy $-\sum_c p_c \log p_c$ of each pixel, (B, *S), from logits (B, C, *S)."""
    log_p = at_least_float32(logits).log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def divergence_from_uniform(logits: Tensor) -> Tensor:
    r"""$\mathrm{KL}(u, p) + \mathrm{const} = -\frac{1}{C} \sum_c \log p_c$ of each pixel, (B, *S)."""
    return -at_least_float32(logits).log_softmax(dim=1).mean(dim=1)

"""The mean of a network over its last steps, which labels and predicts in its place."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Teacher(nn.Module):
    r"""A copy of a network that follows it slowly (Mean Teacher, Tarvainen and Valpola, 2017).

    After each step $\theta' \leftarrow \alpha \theta' + (1 - \alpha) \theta$, parameters and running statistics alike.
    No gradient reaches it, and it is always in evaluation mode.

    Args:
        student: The network that it follows.
        decay: $\alpha$.

    Raises:
        ValueError: If `decay` is not in [0, 1).

    Examples:
        >>> import torch
        >>> from apl_lightning.teacher import Teacher
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> teacher = Teacher(student, decay=0.75)
        >>> _ = torch.nn.init.constant_(teacher.model.weight, 0.0), torch.nn.init.constant_(student.weight, 1.0)
        >>> teacher.follow(student)
        >>> teacher.model.weight.item()
        0.25
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"Expected `ema_decay` to be None or in [0, 1), but got {decay}.")
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.decay = decay
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    def copy(self, student: nn.Module) -> None:
        """Be the student."""
        self.model.load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move one step towards the student."""
        ours, theirs = [], []
        for mine, other in zip(self.model.state_dict().values(), student.state_dict().values(), strict=True):
            if mine.is_floating_point():
                ours.append(mine)
                theirs.append(other)
            else:
                mine.copy_(other)
        torch._foreach_lerp_(ours, theirs, 1 - self.decay)

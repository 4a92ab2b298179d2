"""The weights of the best round so far, on disk."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import torch
from torch import nn


class BestRound:
    """Keeps the state of a module at the round with the highest score.

    Each has a file of its own, so that a run that is resumed from an older checkpoint finds the one that belongs to it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing is known yet."""
        self.round = -1
        self.score = float("-inf")
        self._saved = -1  # the round that the newest checkpoint needs

    def offer(self, round: int, score: float, module: nn.Module, folder: Path, writes: bool) -> None:
        """Keep the state of the module if the score is the highest yet; one process a node writes."""
        if score <= self.score:
            return
        self.round, self.score = round, score
        if writes:
            unfinished = folder / f"best.{secrets.token_hex(4)}.tmp"
            torch.save(module.state_dict(), unfinished)
            unfinished.replace(_file(folder, round))
            for path in folder.glob("best-*.pt"):
                if path not in (_file(folder, round), _file(folder, self._saved)):
                    path.unlink()

    def is_in(self, folder: Path) -> bool:
        """Whether the kept state is there."""
        return _file(folder, self.round).exists()

    def restore(self, module: nn.Module, folder: Path) -> None:
        """Load the kept state into the module."""
        state = torch.load(_file(folder, self.round), weights_only=True, map_location="cpu")
        module.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: its file is not deleted until the next one."""
        self._saved = self.round
        return {"round": self.round, "score": self.score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.round = self._saved = state_dict["round"]
        self.score = state_dict["score"]


def _file(folder: Path, round: int) -> Path:
    return folder / f"best-{round:06d}.pt"

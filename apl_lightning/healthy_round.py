"""The weights of the last round that the guard had no complaint about, on disk."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch
from torch import nn


class HealthyRound:
    """Keeps the state of a module.

    Each round has a file of its own, so that a run that is resumed from an older checkpoint finds the one that belongs
    to it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing is kept yet."""
        self.round = -1
        self._saved = -1  # the round that the newest checkpoint needs

    def keep(self, round: int, module: nn.Module, folder: Path, writes: bool) -> None:
        """Keep the state of the module in place of an earlier one; one process a node writes."""
        self.round = round
        if writes:
            unfinished = folder / f"healthy.{secrets.token_hex(4)}.tmp"
            torch.save(module.state_dict(), unfinished)
            unfinished.replace(_file(folder, round))
            for path in folder.glob("healthy-*.pt"):
                if path not in (_file(folder, round), _file(folder, self._saved)):
                    path.unlink()

    def is_in(self, folder: Path) -> bool:
        """Whether the kept state is there."""
        return _file(folder, self.round).exists()

    def restore(self, module: nn.Module, folder: Path) -> None:
        """Load the kept state into the module."""
        state = torch.load(_file(folder, self.round), weights_only=True, map_location="cpu")
        module.load_state_dict(state)

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint: its file is not deleted until the next one."""
        self._saved = self.round
        return {"round": self.round}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a checkpoint."""
        self.round = self._saved = state_dict["round"]


def _file(folder: Path, round: int) -> Path:
    return folder / f"healthy-{round:06d}.pt"

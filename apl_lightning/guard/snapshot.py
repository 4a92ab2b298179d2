"""The weights of the best candidate, on disk."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apl_lightning._support.files import explaining_disk_errors, read_checked, write_checked


class Snapshot:
    """Keeps the state of a module. Each round has its own file, so a resumed run finds that of its checkpoint.

    The checkpoint has the checksum of the file: another run that was resumed in the same folder may have written one
    for the same round.
    """

    def __init__(self) -> None:
        self.round = -1  # the network as it came in
        self._checksum: int | None = None  # of the file; known to rank 0, which saves it
        self._saved: int | None = None  # the round that the newest checkpoint refers to

    def write(self, module: nn.Module, folder: Path) -> None:
        """Write the state of the module for `round`, and delete an earlier one; one process per node calls it."""
        content = io.BytesIO()
        torch.save(module.state_dict(), content)
        with explaining_disk_errors(folder, "a network"):
            self._checksum = write_checked(_file(folder, self.round), content.getvalue())
        kept = {_file(folder, round) for round in (self.round, self._saved) if round is not None}
        for path in set(folder.glob("best-*.pt")) - kept:
            path.unlink(missing_ok=True)  # on a shared disk another node may be faster

    def is_in(self, folder: Path) -> bool:
        """Whether the file of the snapshot is as it was written."""
        try:
            self._read(folder)
        except OSError:
            return False
        return True

    def restore(self, module: nn.Module, folder: Path) -> None:
        """Load the snapshot into the module."""
        state = torch.load(io.BytesIO(self._read(folder)), weights_only=True, map_location="cpu")
        module.load_state_dict(state)

    def protect(self) -> None:
        """Do not delete the current file before the next checkpoint, which will refer to another one."""
        self._saved = self.round

    def state_dict(self) -> dict[str, int | None]:
        """The round of the snapshot, and the checksum of its file."""
        return {"round": self.round, "checksum": self._checksum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.round = self._saved = state_dict["round"]
        self._checksum = state_dict["checksum"]

    def _read(self, folder: Path) -> bytes:
        return read_checked(_file(folder, self.round), self._checksum)


def _file(folder: Path, round: int) -> Path:
    return folder / f"best-{round + 1:06d}.pt"

"""A round on nodes that share no disk: each is sent what it lacks, piece by piece."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from apl_lightning import ranks
from apl_lightning.round_files import rank_files

_PIECE = 4 * 2**20


def complete(folder: Path, responsible: bool) -> None:
    """Bring the files of all ranks into a round's folder, on every node. All ranks call it.

    Whether a disk is shared is seen, not configured: a file that is there need not be sent. No rank holds more than
    one piece of a file in memory.

    Args:
        folder: The round's folder, as this rank's node sees it.
        responsible: Whether this rank writes for its node.
    """
    size = ranks.world_size()
    lacking = {rank for rank in range(size) if responsible and not all(p.exists() for p in rank_files(folder, rank))}
    for rank in sorted(set().union(*ranks.gather(lacking))):
        for path in rank_files(folder, rank):
            with ranks.together(f"Sending pseudo labels of rank {rank}"):
                _send(path, rank, receives=rank in lacking)


def _send(path: Path, source: int, receives: bool) -> None:
    """Send a file of one rank; who fails goes on taking part, so that nobody waits for it."""
    failure: Exception | None = None
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    pieces = _pieces(path) if ranks.rank() == source else None
    while True:
        piece: bytes | Exception = b""
        if pieces is not None:
            try:
                piece = next(pieces, b"")
            except OSError as error:
                piece = error
        piece = ranks.broadcast(piece, source)
        if isinstance(piece, Exception):
            raise piece
        if not piece:
            break
        if receives and failure is None:
            try:
                with unfinished.open("ab") as file:
                    file.write(piece)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
    if receives:
        unfinished.touch()  # a rank without a sample has an empty file
        os.replace(unfinished, path)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece

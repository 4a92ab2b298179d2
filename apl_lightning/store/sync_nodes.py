"""Nodes without a shared disk exchange the files of a round."""

from collections.abc import Iterator
from pathlib import Path

from apl_lightning._support import distributed
from apl_lightning._support.files import replacing
from apl_lightning.store.round_files import rank_files

_PIECE = 4 * 2**20


def complete_round(folder: Path, responsible: bool) -> None:
    """Bring the files of all ranks into a round's folder, on every node; all ranks call it, `responsible` ones write.

    Shared disks are detected; nodes receive only missing files. No rank holds more than one piece of a file in memory.
    """
    ranks = range(distributed.world_size())
    missing = {rank for rank in ranks if responsible and not all(p.exists() for p in rank_files(folder, rank))}
    for rank in sorted(set().union(*distributed.gather(missing))):
        for path in rank_files(folder, rank):
            with distributed.all_or_none(f"Sending pseudo labels of rank {rank}"):
                _send(path, rank, receives=rank in missing)


def _send(path: Path, source: int, receives: bool) -> None:
    """Send a file of one rank to those that miss it."""
    pieces = _broadcast_pieces(path, source)
    try:
        if receives:
            with replacing(path) as unfinished, unfinished.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
    finally:
        for _ in pieces:  # a rank that fails, or needs nothing, still takes part in every broadcast
            pass


def _broadcast_pieces(path: Path, source: int) -> Iterator[bytes]:
    """The pieces of a file of the rank `source`, on all ranks; if it cannot be read, all of them raise the error."""
    pieces = _pieces(path) if distributed.rank() == source else None
    while True:
        piece: bytes | Exception = b""
        if pieces is not None:
            try:
                piece = next(pieces, b"")
            except OSError as error:
                piece = error
        piece = distributed.broadcast(piece, source)
        if isinstance(piece, Exception):
            raise piece
        if not piece:
            return
        yield piece


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece

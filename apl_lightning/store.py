"""Pseudo labels and weights on disk, by sample index and round."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_POINTER = "current"
_IDENTITY = "store.json"
_INDEX = "index.npz"


class PseudoLabel(NamedTuple):
    """What the store holds for one image: labels (*S), weights (*S) in [0, 1], and the round that made them."""

    labels: Tensor
    weights: Tensor
    round: int


class PseudoLabelStore:
    """One folder with the pseudo labels of a data set: one byte a pixel for the label, one for its weight.

    Each round has a folder of its own. Every rank appends the samples of its share to its own file; `commit` joins
    the tables of all ranks and then moves a pointer file in one step. A reader follows the pointer at each read,
    so that persistent workers see a new round at once, and nobody ever sees half of one.

    Args:
        directory: The folder; made when the first round is written.
        length: Number of samples.
        identity: What tells this data set from another (a hash of some images).

    Raises:
        ValueError: If the folder holds something else, or the labels of another data set.

    Example:
        >>> import tempfile, torch
        >>> from apl_lightning import PseudoLabelStore
        >>> store = PseudoLabelStore(tempfile.mkdtemp(), length=1)
        >>> with store.write(round=0, num_classes=5) as writer:
        ...     writer.add(0, torch.tensor([[3, 4]]), torch.tensor([[1.0, 0.2]]))
        >>> store.commit(round=0)
        >>> store.read(0)
        PseudoLabel(labels=tensor([[3, 4]]), weights=tensor([[1.0000, 0.2000]]), round=0)
    """

    def __init__(self, directory: str | Path, length: int, identity: str = "") -> None:
        self.directory = Path(directory)
        self.length = length
        self.identity = identity
        self._mapped: tuple[object, _MappedRound] | None = None
        self._check_identity()

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy that never changes: every process opens its own.
        return {**self.__dict__, "_mapped": None}

    @property
    def current(self) -> int | None:
        """The round that readers see, or `None` before the first."""
        try:
            return int((self.directory / _POINTER).read_text())
        except FileNotFoundError:
            return None

    def has(self, round: int) -> bool:
        """Whether all labels of this round are here."""
        return (self._folder(round) / _INDEX).exists()

    def read(self, index: int) -> PseudoLabel:
        """The labels of one image in the current round.

        Raises:
            RuntimeError: If there is no round yet.
        """
        try:
            pointer = os.stat(self.directory / _POINTER)
        except FileNotFoundError:
            raise RuntimeError(
                f"Expected pseudo labels in {self.directory}, but no round is there yet: train with "
                "`PseudoLabelCallback`, which makes them before the first batch."
            ) from None
        version = (pointer.st_ino, pointer.st_mtime_ns)  # the pointer is a new file each time it moves
        if self._mapped is None or self._mapped[0] != version:
            current = self.current
            assert current is not None
            self._mapped = (version, _MappedRound(self._folder(current), current))
        return self._mapped[1].read(index)

    def write(self, round: int, num_classes: int, rank: int = 0) -> RoundWriter:
        """A context manager that writes the share of one rank in one round.

        Raises:
            ValueError: If there are more classes than two bytes can tell apart.
        """
        if num_classes > 65535:
            raise ValueError(f"Expected at most 65535 classes, but got {num_classes}.")
        self._folder(round).mkdir(parents=True, exist_ok=True)
        return RoundWriter(self._folder(round), rank, np.dtype(np.uint8 if num_classes <= 256 else np.uint16))

    def start(self, round: int) -> None:
        """Make room for a round: drop what an interrupted run left of it and go back to the round before.

        One process a node calls it, before any rank writes.
        """
        self._check_identity()
        if self.has(round - 1):
            self.show(round - 1)
        else:
            (self.directory / _POINTER).unlink(missing_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        _write_text(self.directory / _IDENTITY, json.dumps({"length": self.length, "identity": self.identity}))
        shutil.rmtree(self._folder(round), ignore_errors=True)
        self._folder(round).mkdir()

    def commit(self, round: int) -> None:
        """Show a round to the readers. One process a node calls it, after all ranks have written.

        Raises:
            RuntimeError: If a sample has no label, or two.
        """
        folder = self._folder(round)
        tables = [table for path in sorted(folder.glob("rank-*.npz")) if len((table := np.load(path))["sample"])]
        table = {key: np.concatenate([part[key] for part in tables]) for key in ("sample", "offset", "shape", "rank")}
        if not np.array_equal(np.sort(table["sample"]), np.arange(self.length)):
            raise RuntimeError(
                f"Expected one label for each of {self.length} samples in round {round}, but got "
                f"{len(table['sample'])} for {len(np.unique(table['sample']))} samples."
            )
        order = np.argsort(table["sample"])
        unfinished = folder / f"{_INDEX}.tmp.npz"
        columns = {key: table[key][order] for key in ("rank", "offset", "shape")}
        np.savez(unfinished, **columns, dtype=tables[0]["dtype"])
        os.replace(unfinished, folder / _INDEX)
        self.show(round)

    def show(self, round: int) -> None:
        """Move the pointer to a round that is here."""
        _write_text(self.directory / _POINTER, str(round))

    def prune(self, keep: set[int]) -> None:
        """Delete every round that is not in `keep`."""
        for folder in self.directory.glob("round-*"):
            if int(folder.name.removeprefix("round-")) not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, round: int) -> Path:
        return self.directory / f"round-{round:06d}"

    def _check_identity(self) -> None:
        if not self.directory.exists() or not any(self.directory.iterdir()):
            return
        try:
            found = json.loads((self.directory / _IDENTITY).read_text())
        except FileNotFoundError:
            raise ValueError(
                f"Expected `directory` to be empty or a store, but {self.directory} holds other files: name another "
                "folder."
            ) from None
        if found != {"length": self.length, "identity": self.identity}:
            raise ValueError(
                f"Expected the pseudo labels of this data set ({self.length} samples, {self.identity or 'no hash'}), "
                "but "
                f"{self.directory} holds those of another ({found['length']} samples, "
                f"{found['identity'] or 'no hash'}): "
                "name another folder."
            )


class RoundWriter:
    """Appends the labels of one rank's share to its file; the table of contents follows on a clean exit."""

    def __init__(self, folder: Path, rank: int, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._rank = rank
        self._dtype = dtype
        self._samples: list[int] = []
        self._offsets: list[int] = []
        self._shapes: list[tuple[int, ...]] = []
        self._file = open(folder / f"rank-{rank:05d}.bin", "wb")  # noqa: SIM115 - closed by __exit__

    def add(self, index: int, labels: Tensor, weights: Tensor) -> None:
        """Append one image: labels (*S) and weights (*S) in [0, 1].

        Raises:
            ValueError: If the shapes differ, or a weight is not in [0, 1].
            OSError: If the disk is full; the message tells what to do.
        """
        if labels.shape != weights.shape or not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(
                f"Expected labels and weights of one shape and weights in [0, 1] for sample {index}, but got "
                f"{tuple(labels.shape)} and {tuple(weights.shape)}, weights from {weights.min()} to {weights.max()}: "
                "check the denoiser."
            )
        self._samples.append(index)
        self._offsets.append(self._file.tell())
        self._shapes.append(tuple(labels.shape))
        try:
            self._file.write(labels.cpu().numpy().astype(self._dtype).tobytes())
            self._file.write((weights * 255).round().to(torch.uint8).cpu().numpy().tobytes())
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror} while writing pseudo labels ({self._dtype.itemsize + 1} bytes a pixel) to "
                f"{self._folder}: free some space or pass another `store_dir`",
            ) from error

    def __enter__(self) -> RoundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            dimensions = len(self._shapes[0]) if self._shapes else 0
            np.savez(
                self._folder / f"rank-{self._rank:05d}.npz",
                rank=np.full(len(self._samples), self._rank),
                sample=np.array(self._samples, dtype=np.int64),
                offset=np.array(self._offsets, dtype=np.int64),
                shape=np.array(self._shapes, dtype=np.int64).reshape(len(self._shapes), dimensions),
                dtype=self._dtype.name,
            )


class _MappedRound:
    """The files of one round, mapped into memory."""

    def __init__(self, folder: Path, round: int) -> None:
        self.round = round
        with np.load(folder / _INDEX) as index:
            self._rank, self._offset, self._shape = index["rank"], index["offset"], index["shape"]
            self._dtype = np.dtype(str(index["dtype"]))
        self._files = {
            rank: np.memmap(folder / f"rank-{rank:05d}.bin", dtype=np.uint8, mode="r") for rank in np.unique(self._rank)
        }

    def read(self, index: int) -> PseudoLabel:
        shape = tuple(int(size) for size in self._shape[index])
        pixels = int(np.prod(shape))
        start = int(self._offset[index])
        middle = start + pixels * self._dtype.itemsize
        data = self._files[self._rank[index]]
        labels = data[start:middle].view(self._dtype).reshape(shape).astype(np.int64)
        weights = data[middle : middle + pixels].reshape(shape).astype(np.float32) / 255
        return PseudoLabel(torch.from_numpy(labels), torch.from_numpy(weights), self.round)


def _write_text(path: Path, text: str) -> None:
    """Write a small file in one step: a reader sees the old text or the new one."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)

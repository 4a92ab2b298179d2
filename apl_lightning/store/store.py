"""Pseudo labels and weights on disk, by sample index and round."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from apl_lightning._support.files import replacing
from apl_lightning.store.round_files import INDEX, PseudoLabel, RoundReader, RoundWriter, write_index

_POINTER = "current"
_IDENTITY = "store.json"


class PseudoLabelStore:
    """A folder with the pseudo labels of a data set: one byte per pixel for the label, one for its weight.

    Each round has its own folder. Every rank writes the samples of its share to its own file, `join` makes one index of
    all ranks, and `publish` atomically replaces a pointer file. Readers follow the pointer at each read, so persistent
    workers see a new round at once, and never a part of one.

    Args:
        directory: The folder; created with the first round.
        length: Number of samples.
        identity: A hash that identifies the data set.

    Raises:
        ValueError: If the folder contains other files, or the labels of another data set.

    Examples:
        >>> import tempfile, torch
        >>> from apl_lightning import PseudoLabelStore
        >>> store = PseudoLabelStore(tempfile.mkdtemp(), length=1)
        >>> with store.write(round=0, num_classes=5) as writer:
        ...     writer.add(0, torch.tensor([[3, 4]]), torch.tensor([[1.0, 0.2]]))
        >>> store.join(round=0)
        >>> store.publish(round=0)
        >>> store.read(0)
        PseudoLabel(labels=tensor([[3, 4]]), weights=tensor([[1.0000, 0.2000]]), round=0)
    """

    def __init__(self, directory: str | Path, length: int, identity: str = "") -> None:
        self.directory = Path(directory)
        self.length = length
        self.identity = identity
        self._mapped: tuple[object, RoundReader] | None = None
        self._check_identity()

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as a copy that never changes: every process opens its own.
        return {**self.__dict__, "_mapped": None}

    @property
    def current(self) -> int | None:
        """The published round; `None` before the first."""
        try:
            return int((self.directory / _POINTER).read_text())
        except FileNotFoundError:
            return None

    def has(self, round: int) -> bool:
        """Whether all labels of this round exist."""
        return (self.folder(round) / INDEX).exists()

    def read(self, index: int) -> PseudoLabel:
        """The pseudo label of one image in the published round; a `RuntimeError` if there is none."""
        try:
            pointer = os.stat(self.directory / _POINTER)
            version = (pointer.st_ino, pointer.st_mtime_ns)  # every `publish` makes a new file
            if self._mapped is None or self._mapped[0] != version:
                current = self.current
                assert current is not None
                self._mapped = (version, self.reader(current))
        except FileNotFoundError:
            raise RuntimeError(
                f"Expected pseudo labels in {self.directory}, but no round is there: train with "
                "`PseudoLabelCallback`, which makes them before the first batch. If the run has one, the labels were "
                "deleted while it was on: resume it from its last checkpoint, and they are made anew."
            ) from None
        return self._mapped[1].read(index)

    def write(self, round: int, num_classes: int, rank: int = 0) -> RoundWriter:
        """A context manager that writes the share of one rank; a `ValueError` for more than 65535 classes."""
        if num_classes > 65535:
            raise ValueError(f"Expected at most 65535 classes, but got {num_classes}.")
        self.folder(round).mkdir(parents=True, exist_ok=True)
        return RoundWriter(self.folder(round), rank, np.dtype(np.uint8 if num_classes <= 256 else np.uint16))

    def start(self, round: int) -> None:
        """Create the folder of a round, without what an interrupted run may have left, and publish the round before.

        One process per node calls it, before any rank writes.
        """
        self._check_identity()
        if self.has(round - 1):
            self.publish(round - 1)
        else:
            (self.directory / _POINTER).unlink(missing_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / _IDENTITY, json.dumps({"length": self.length, "identity": self.identity}))
        shutil.rmtree(self.folder(round), ignore_errors=True)
        self.folder(round).mkdir(exist_ok=True)  # another node may share the disk

    def join(self, round: int) -> None:
        """Join the files of all ranks; one process per node calls it."""
        write_index(self.folder(round), round, self.length)

    def reader(self, round: int) -> RoundReader:
        """A joined round, published or not."""
        return RoundReader(self.folder(round), round)

    def publish(self, round: int) -> None:
        """Make a joined round the one that readers see."""
        _write(self.directory / _POINTER, str(round))

    def prune(self, keep: set[int]) -> None:
        """Delete all other rounds."""
        for folder in self.directory.glob("round-*"):
            if int(folder.name.removeprefix("round-")) not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    def folder(self, round: int) -> Path:
        """The folder of a round."""
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
                f"but {self.directory} holds those of another ({found['length']} samples, "
                f"{found['identity'] or 'no hash'}): name another folder."
            )


def _write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text)

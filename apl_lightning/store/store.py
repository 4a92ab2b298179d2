"""Pseudo labels and weights on disk, by sample index and round."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from torch import Tensor

from apl_lightning._support.files import replacing
from apl_lightning.store.round_files import CURE, INDEX, RoundWriter, write_index
from apl_lightning.store.round_reader import PseudoLabel, RoundReader

_POINTER = "current"
_MARK = "store.json"  # marks a folder as a store


class PseudoLabelStore:
    """A folder with the pseudo labels of a data set: one byte per pixel for the label, one for its weight.

    Each round has its own folder. Every rank writes the samples of its share to its own file, `join` makes one index of
    all ranks, and `publish` atomically replaces a pointer file. Readers follow the pointer at each read, so persistent
    workers see a new round at once, and never a part of one.

    Args:
        directory: The folder; created with the first round.
        length: Number of samples.

    Raises:
        ValueError: If the folder contains other files, or the labels of a data set of another length.

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

    def __init__(self, directory: str | Path, length: int) -> None:
        self.directory = Path(directory)
        self.length = length
        self._opened: tuple[object, RoundReader] | None = None
        self._check_folder()

    @property
    def current(self) -> int | None:
        """The published round; `None` before the first."""
        try:
            return self._pointed_to()
        except FileNotFoundError:
            return None

    def has(self, round: int) -> bool:
        """Whether the labels of this round are complete."""
        return (self.folder(round) / INDEX).exists()

    def damage(self, round: int, checksum: int | None = None) -> str:
        """What is missing, damaged or of another checksum in the files of this round; an empty string if nothing is."""
        try:
            reader = self.reader(round)
            reader.check()
        except RuntimeError as error:
            return f"{str(error).removesuffix(CURE)}."
        if checksum not in (None, reader.checksum):
            return f"Those in {self.folder(round)} are of another run, which was resumed in the same folder."
        return ""

    def read(self, index: int) -> PseudoLabel:
        """The pseudo label of one image in the published round.

        Raises:
            RuntimeError: If no round is published, or the files are damaged.
        """
        try:
            return self._published().read(index)
        except RuntimeError:
            self._published()  # an error that explains more if the whole store is gone
            raise

    def fingerprint(self, index: int) -> Tensor:
        """What identifies the image that the published pseudo label was made on, (K,)."""
        return self._published().fingerprint(index)

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
        self._check_folder()
        if self.has(round - 1):
            self.publish(round - 1)
        else:
            (self.directory / _POINTER).unlink(missing_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / _MARK, json.dumps({"length": self.length}))
        self.discard(round)
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

    def discard(self, round: int) -> None:
        """Delete a round."""
        shutil.rmtree(self.folder(round), ignore_errors=True)

    def prune(self, keep: set[int]) -> None:
        """Delete all other rounds."""
        for folder in self.directory.glob("round-*"):
            if (round := int(folder.name.removeprefix("round-"))) not in keep:
                self.discard(round)

    def folder(self, round: int) -> Path:
        """The folder of a round."""
        return self.directory / f"round-{round:06d}"

    def _pointed_to(self) -> int:
        text = (self.directory / _POINTER).read_text()
        if not text.isdigit():
            raise RuntimeError(
                f"Expected {self.directory / _POINTER} to hold the number of a round, but got {text!r}: resume the run "
                "from its last checkpoint, which writes it anew."
            )
        return int(text)

    def _published(self) -> RoundReader:
        """The reader of the published round; a `RuntimeError` if there is none."""
        try:
            pointer = os.stat(self.directory / _POINTER)
            version = (pointer.st_ino, pointer.st_mtime_ns)  # every `publish` makes a new file
            if self._opened is None or self._opened[0] != version:
                self._opened = version, self.reader(self._pointed_to())
        except FileNotFoundError:
            raise RuntimeError(
                f"Expected pseudo labels in {self.directory}, but no round is there: train with "
                "`PseudoLabelCallback`, which makes them before the first batch (`TentModule` needs none: pass it a "
                "`DataLoader` of images). If the run has one, the labels were deleted while it was on: resume it from "
                "its last checkpoint, and they are made anew."
            ) from None
        return self._opened[1]

    def _check_folder(self) -> None:
        # Hidden files are those that another node on a shared disk is writing.
        if not self.directory.exists() or all(path.name.startswith(".") for path in self.directory.iterdir()):
            return
        mark = self.directory / _MARK
        if not mark.exists():
            raise ValueError(
                f"Expected `directory` to be empty or a store, but {self.directory} holds other files: name another "
                "folder."
            )
        if (found := mark.read_text()) != (expected := json.dumps({"length": self.length})):
            raise ValueError(
                f"Expected the pseudo labels of a data set of this length, {expected}, but {mark} says {found!r}: "
                "resume a run with the images that it began with; for another run, name another folder."
            )


def _write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text)

"""The files of one round: a data file and a table of contents for each rank, and an index that joins the tables."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apl_lightning._support.files import read_checked, write_checked
from apl_lightning._support.soft_labels import is_soft

INDEX = "index.npz"
_COLUMNS = ("sample", "rank", "offset", "shape", "case", "checksum", "fingerprint")


_NONE = torch.empty(0)


class PseudoLabel(NamedTuple):
    """The pseudo label of one image: labels (*S) or soft labels (C, *S), weights (*S) in [0, 1], and the round."""

    labels: Tensor
    weights: Tensor
    round: int

    @property
    def classes(self) -> Tensor:
        """Labels as class indices (*S)."""
        return self.labels.max(dim=0).indices if is_soft(self.labels, self.weights) else self.labels


def rank_files(folder: Path, rank: int) -> tuple[Path, Path]:
    """The data file of a rank and its table of contents, which is written last."""
    return folder / f"rank-{rank:05d}.bin", folder / f"rank-{rank:05d}.npz"


class RoundWriter:
    """Appends the labels of one rank's share to its data file; the table of contents follows on a clean exit."""

    def __init__(self, folder: Path, rank: int, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._rank = rank
        self._data, self._table = rank_files(folder, rank)
        self._dtype = dtype
        self._rows: list[tuple[Any, ...]] = []  # sample, offset, shape, case, checksum, fingerprint
        self._planes = 0  # number of classes of soft labels
        self._file = self._data.open("wb")

    def add(self, index: int, labels: Tensor, weights: Tensor, case: str = "", fingerprint: Tensor = _NONE) -> None:
        """Append one image: class indices (*S) or soft labels (C, *S), weights (*S) in [0, 1], and its case if known.

        Soft labels and weights are stored in steps of 1/255. The fingerprint (K,) identifies the image later.

        Raises:
            ValueError: If the shapes differ, or a weight is not in [0, 1].
            OSError: If the disk is full; the message says what to do.
        """
        soft = is_soft(labels, weights)
        shape = labels.shape[1:] if soft else labels.shape
        if shape != weights.shape or not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(
                f"Expected labels and weights of one shape and weights in [0, 1] for sample {index}, but got "
                f"{tuple(labels.shape)} and {tuple(weights.shape)}, weights from {weights.min()} to {weights.max()}: "
                "check the denoiser."
            )
        content = _bytes(labels) if soft else labels.cpu().numpy().astype(self._dtype).tobytes()
        content += _bytes(weights)
        row = (index, self._file.tell(), tuple(shape), case, google_crc32c.value(content), fingerprint.tolist())
        self._rows.append(row)
        self._planes = len(labels) if soft else 0
        with self._explained():
            self._file.write(content)

    def __enter__(self) -> "RoundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._explained():
            self._file.close()
        if kind is None:
            columns = zip(*self._rows, strict=True) if self._rows else [()] * 6
            samples, offsets, shapes, cases, checksums, fingerprints = columns
            table = {
                "rank": np.full(len(samples), self._rank),
                "sample": np.array(samples, dtype=np.int64),
                "offset": np.array(offsets, dtype=np.int64),
                "shape": np.array(shapes, dtype=np.int64),
                "case": np.array(cases, dtype=np.str_),
                "checksum": np.array(checksums, dtype=np.uint32),
                "fingerprint": np.array(fingerprints, dtype=np.float32),
            }
            _save(self._table, {**table, "dtype": self._dtype.name, "planes": self._planes})

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror} while writing pseudo labels ({self._dtype.itemsize + 1} bytes per pixel) to "
                f"{self._folder}: free some space or pass another `store_dir`",
            ) from error


def _bytes(shares: Tensor) -> bytes:
    """Values in [0, 1] in steps of 1/255."""
    return (shares * 255).round().to(torch.uint8).cpu().numpy().tobytes()


def write_index(folder: Path, round: int, length: int) -> None:
    """Join the tables of all ranks, sorted by sample; a sample without a label or with two is a `RuntimeError`."""
    tables = [_load(path) for path in sorted(folder.glob("rank-*.npz"))]
    filled = [table for table in tables if len(table["sample"])]  # the table of an empty share knows no dimensions
    joined = {key: np.concatenate([table[key] for table in filled]) for key in _COLUMNS}
    samples = joined["sample"]
    if not np.array_equal(np.sort(samples), np.arange(length)):
        raise RuntimeError(
            f"Expected one label for each of {length} samples in round {round}, but got {len(samples)} for "
            f"{len(np.unique(samples))} samples."
        )
    order = np.argsort(samples)
    columns = {key: column[order] for key, column in joined.items()}
    _save(folder / INDEX, {**columns, "dtype": filled[0]["dtype"], "planes": filled[0]["planes"]})


def _save(path: Path, table: dict[str, Any]) -> None:
    """Write a table of contents or an index."""
    content = io.BytesIO()
    np.savez(content, **table)
    write_checked(path, content.getvalue())


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_checked(path)
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from error
    with np.load(io.BytesIO(content)) as table:
        return dict(table)


def _damaged(path: Path, what: str) -> RuntimeError:
    return RuntimeError(
        f"Expected {path} as it was written, but it is missing or damaged ({what}): resuming the run from its last "
        "checkpoint makes its pseudo labels anew."
    )


class RoundReader:
    """The files of one round; whatever is read from them is compared with its checksum."""

    def __init__(self, folder: Path, round: int) -> None:
        self.round = round
        self._folder = folder
        self._index = _load(folder / INDEX)
        self.cases = [str(case) for case in self._index["case"]]  # "" if unknown
        self._dtype = np.dtype(str(self._index["dtype"]))
        self._planes = int(self._index["planes"])

    def shape(self, index: int) -> tuple[int, ...]:
        """The spatial size of one sample."""
        return tuple(int(size) for size in self._index["shape"][index])

    def fingerprint(self, index: int) -> Tensor:
        """What identifies the image of one sample, (K,)."""
        return torch.from_numpy(self._index["fingerprint"][index])

    def read(self, index: int) -> PseudoLabel:
        """Labels and weights of one sample."""
        labels, weights = self._arrays(index)
        labels = labels.astype(np.float32) / 255 if self._planes else labels.astype(np.int64)
        return PseudoLabel(torch.from_numpy(labels), torch.from_numpy(weights.astype(np.float32) / 255), self.round)

    def stored(self, index: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Class indices and weights (in steps of 1/255) of one sample, both (*S)."""
        labels, weights = self._arrays(index)
        return (labels.argmax(axis=0).astype(np.uint16) if self._planes else labels), weights

    def check(self) -> None:
        """Compare all samples with their checksums; a `RuntimeError` names the first file that differs."""
        for index in range(len(self.cases)):
            self._content(index)

    def ignore(self, pixels: Mapping[int, NDArray[Any]]) -> None:
        """Set the weights of these pixels (indices in C order, for each sample) to 0, before the round is published."""
        checksums = self._index["checksum"].copy()
        for index, chosen in pixels.items():
            path, start, middle, end = self._span(index)
            with path.open("r+b") as file:
                file.seek(start)
                content = np.frombuffer(file.read(end - start), dtype=np.uint8).copy()
                content[middle - start :][chosen] = 0
                file.seek(start)
                file.write(content.tobytes())
            checksums[index] = google_crc32c.value(content.tobytes())
        self._index["checksum"] = checksums
        _save(self._folder / INDEX, self._index)

    def _arrays(self, index: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        content, shape = self._content(index), self.shape(index)
        weights = np.frombuffer(content, dtype=np.uint8)[-int(np.prod(shape)) :].reshape(shape)
        if self._planes:
            return np.frombuffer(content, dtype=np.uint8)[: -weights.size].reshape(self._planes, *shape), weights
        return np.frombuffer(content, dtype=self._dtype, count=weights.size).reshape(shape), weights

    def _content(self, index: int) -> bytes:
        """Labels and weights of one sample, as they were written."""
        path, start, _, end = self._span(index)
        try:
            # Opened anew, as processes that are forked share the position in an open file.
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(end - start)
        except OSError as error:
            raise _damaged(path, str(error.strerror)) from error
        if google_crc32c.value(content) != self._index["checksum"][index]:
            raise _damaged(path, f"the checksum of sample {index} differs")
        return content

    def _span(self, index: int) -> tuple[Path, int, int, int]:
        """The file of one sample, and the offsets in it where labels begin, where weights begin, and where both end."""
        pixels = int(np.prod(self._index["shape"][index]))
        start = int(self._index["offset"][index])
        middle = start + pixels * (self._planes or self._dtype.itemsize)
        return rank_files(self._folder, int(self._index["rank"][index]))[0], start, middle, middle + pixels

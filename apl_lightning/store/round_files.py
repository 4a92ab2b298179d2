"""The files of one round: a data file and a table of contents for each rank, and an index that joins the tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apl_lightning._support.files import replacing
from apl_lightning._support.soft_labels import is_soft

INDEX = "index.npz"
_COLUMNS = ("sample", "rank", "offset", "shape", "case")


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
        self._rows: list[tuple[int, int, tuple[int, ...], str]] = []  # sample, offset, shape, case
        self._planes = 0  # number of classes of soft labels
        self._file = self._data.open("wb")

    def add(self, index: int, labels: Tensor, weights: Tensor, case: str = "") -> None:
        """Append one image: class indices (*S) or soft labels (C, *S), weights (*S) in [0, 1], and its case if known.

        Soft labels and weights are stored in steps of 1/255.

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
        self._rows.append((index, self._file.tell(), tuple(shape), case))
        self._planes = len(labels) if soft else 0
        with self._explained():
            self._file.write(_bytes(labels) if soft else labels.cpu().numpy().astype(self._dtype).tobytes())
            self._file.write(_bytes(weights))

    def __enter__(self) -> "RoundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._explained():
            self._file.close()
        if kind is None:
            samples, offsets, shapes, cases = zip(*self._rows, strict=True) if self._rows else ((), (), (), ())
            np.savez(
                self._table,
                rank=np.full(len(samples), self._rank),
                sample=np.array(samples, dtype=np.int64),
                offset=np.array(offsets, dtype=np.int64),
                shape=np.array(shapes, dtype=np.int64),
                case=np.array(cases, dtype=np.str_),
                dtype=self._dtype.name,
                planes=self._planes,
            )

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
    tables = []
    for path in sorted(folder.glob("rank-*.npz")):
        with np.load(path) as table:
            tables.append(dict(table))
    filled = [table for table in tables if len(table["sample"])]  # the table of an empty share knows no dimensions
    joined = {key: np.concatenate([table[key] for table in filled]) for key in _COLUMNS}
    samples = joined.pop("sample")
    if not np.array_equal(np.sort(samples), np.arange(length)):
        raise RuntimeError(
            f"Expected one label for each of {length} samples in round {round}, but got {len(samples)} for "
            f"{len(np.unique(samples))} samples."
        )
    order = np.argsort(samples)
    columns: dict[str, Any] = {key: column[order] for key, column in joined.items()}
    with replacing(folder / INDEX) as unfinished:
        np.savez(unfinished, **columns, dtype=filled[0]["dtype"], planes=filled[0]["planes"])


class RoundReader:
    """The files of one round, mapped into memory."""

    def __init__(self, folder: Path, round: int) -> None:
        self.round = round
        with np.load(folder / INDEX) as index:
            self._rank, self._offset, self._shape = index["rank"], index["offset"], index["shape"]
            self.cases = [str(case) for case in index["case"]]  # "" if unknown
            self._dtype = np.dtype(str(index["dtype"]))
            self._planes = int(index["planes"])
        self._paths = {rank: rank_files(folder, rank)[0] for rank in np.unique(self._rank)}
        self._files = {rank: np.memmap(path, dtype=np.uint8, mode="r") for rank, path in self._paths.items()}

    def shape(self, index: int) -> tuple[int, ...]:
        """The spatial size of one sample."""
        return tuple(int(size) for size in self._shape[index])

    def read(self, index: int) -> PseudoLabel:
        """Labels and weights of one sample, copied out of the map."""
        labels, weights = self._views(index)
        labels = labels.astype(np.float32) / 255 if self._planes else labels.astype(np.int64)
        return PseudoLabel(torch.from_numpy(labels), torch.from_numpy(weights.astype(np.float32) / 255), self.round)

    def stored(self, index: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Class indices and weights (in steps of 1/255) of one sample, both (*S); views of the map if possible."""
        labels, weights = self._views(index)
        return (labels.argmax(axis=0).astype(np.uint16) if self._planes else labels), weights

    def ignore(self, pixels: Mapping[int, NDArray[Any]]) -> None:
        """Set the weights of these pixels (indices in C order, for each sample) to 0, before the round is published."""
        files = {rank: np.memmap(path, dtype=np.uint8, mode="r+") for rank, path in self._paths.items()}
        for index, chosen in pixels.items():
            _, middle, end = self._span(index)
            files[self._rank[index]][middle:end][chosen] = 0

    def _views(self, index: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        start, middle, end = self._span(index)
        shape, data = self.shape(index), self._files[self._rank[index]]
        weights = data[middle:end].reshape(shape)
        if self._planes:
            return data[start:middle].reshape(self._planes, *shape), weights
        return data[start:middle].view(self._dtype).reshape(shape), weights

    def _span(self, index: int) -> tuple[int, int, int]:
        """The offsets in the file where labels begin, where weights begin, and where both end."""
        pixels = int(np.prod(self._shape[index]))
        start = int(self._offset[index])
        middle = start + pixels * (self._planes or self._dtype.itemsize)
        return start, middle, middle + pixels

"""Write one round: a data file and a table of contents for each rank, and an index that joins the tables."""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from apl_lightning._support.files import explaining_disk_errors, read_checked, write_checked
from apl_lightning._support.soft_labels import is_soft

INDEX = "index.npz"
CURE = ": resuming the run from its last checkpoint makes its pseudo labels anew."
_COLUMNS = ("sample", "rank", "offset", "shape", "case", "checksum", "fingerprint")
_UNKNOWN = torch.empty(0)


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

    def add(self, index: int, labels: Tensor, weights: Tensor, case: str = "", fingerprint: Tensor = _UNKNOWN) -> None:
        """Append one image: class indices (*S) or soft labels (C, *S), weights (*S) in [0, 1], and its case if known.

        Soft labels and weights are stored in steps of 1/255. The fingerprint (K,) identifies the image later.

        Raises:
            ValueError: If the shapes differ, a weight or a soft label is not in [0, 1], or a class index is negative or
                too large for the file.
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
        # What does not fit would wrap around without a word; a label pass has checked its labels before.
        low, high = (float(value) for value in labels.aminmax())
        if low < 0 or high > (1 if soft else np.iinfo(self._dtype).max):
            raise ValueError(
                f"Expected class indices from 0 to {np.iinfo(self._dtype).max}, or soft labels in [0, 1], for sample "
                f"{index}, but got values from {low:g} to {high:g}: check the denoiser."
            )
        content = _bytes(labels) if soft else labels.cpu().numpy().astype(self._dtype).tobytes()
        content += _bytes(weights)
        row = (index, self._file.tell(), tuple(shape), case, google_crc32c.value(content), fingerprint.tolist())
        planes = len(labels) if soft else 0
        if self._rows and planes != self._planes:
            raise ValueError(
                f"Expected all labels of a round to be soft, or none, but sample {index} has {planes} classes of soft "
                f"labels and those before have {self._planes}: check the denoiser."
            )
        self._planes = planes
        self._rows.append(row)
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
            save_table(self._table, {**table, "dtype": self._dtype.name, "planes": self._planes})

    def _explained(self) -> AbstractContextManager[None]:
        what = f"pseudo labels ({self._dtype.itemsize + 1} bytes per pixel)"
        return explaining_disk_errors(self._folder, what)


def _bytes(shares: Tensor) -> bytes:
    """Values in [0, 1] in steps of 1/255."""
    return (shares * 255).round().to(torch.uint8).cpu().numpy().tobytes()


def write_index(folder: Path, round: int, length: int) -> None:
    """Join the tables of all ranks, sorted by sample; a sample without a label or with two is a `RuntimeError`."""
    tables = [load_table(path) for path in sorted(folder.glob("rank-*.npz"))]
    filled = [table for table in tables if len(table["sample"])]  # the table of an empty share knows no dimensions
    joined = {key: np.concatenate([table[key] for table in filled]) for key in _COLUMNS}
    samples = joined["sample"]
    if not np.array_equal(np.sort(samples), np.arange(length)):
        raise RuntimeError(
            f"Expected one label for each of {length} samples in round {round}, but got {len(samples)} for "
            f"{len(np.unique(samples))} samples."
        )
    if len(kinds := {(str(table["dtype"]), int(table["planes"])) for table in filled}) > 1:
        raise ValueError(
            f"Expected all labels of round {round} to be soft, or none, but those of the ranks differ (type and number "
            f"of classes of soft labels: {sorted(kinds)}): check the denoiser."
        )
    order = np.argsort(samples)
    columns = {key: column[order] for key, column in joined.items()}
    save_table(folder / INDEX, {**columns, "dtype": filled[0]["dtype"], "planes": filled[0]["planes"]})


def save_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table of contents or an index."""
    content = io.BytesIO()
    np.savez(content, **table)
    with explaining_disk_errors(path.parent, path.name):
        write_checked(path, content.getvalue())


def load_table(path: Path) -> dict[str, Any]:
    """Read a table of contents or an index; a `RuntimeError` if it is missing or damaged."""
    try:
        content = read_checked(path)
    except OSError as error:
        raise damaged(path, str(error.strerror)) from error
    with np.load(io.BytesIO(content)) as table:
        return dict(table)


def damaged(path: Path, what: str) -> RuntimeError:
    """The error for a file that is missing or damaged."""
    return RuntimeError(f"Expected {path} as it was written, but it is missing or damaged ({what}){CURE}")

"""Read one round; whatever is read is compared with its checksum."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apl_lightning._support.soft_labels import is_soft
from apl_lightning.store.round_files import INDEX, damaged, load_table, rank_files, save_table


class PseudoLabel(NamedTuple):
    """The pseudo label of one image: labels (*S) or soft labels (C, *S), weights (*S) in [0, 1], and the round."""

    labels: Tensor
    weights: Tensor
    round: int

    @property
    def classes(self) -> Tensor:
        """Labels as class indices (*S)."""
        return self.labels.max(dim=0).indices if is_soft(self.labels, self.weights) else self.labels


class RoundReader:
    """The files of one round; whatever is read from them is compared with its checksum."""

    def __init__(self, folder: Path, round: int) -> None:
        self.round = round
        self._folder = folder
        self._index = load_table(folder / INDEX)
        self.cases = [str(case) for case in self._index["case"]]  # "" if unknown
        self._dtype = np.dtype(str(self._index["dtype"]))
        self._planes = int(self._index["planes"])

    def shape(self, index: int) -> tuple[int, ...]:
        """The spatial size of one sample."""
        return tuple(int(size) for size in self._index["shape"][index])

    def fingerprint(self, index: int) -> Tensor:
        """What identifies the image of one sample, (K,)."""
        return torch.from_numpy(self._index["fingerprint"][index])

    @property
    def checksum(self) -> int:
        """That of the checksums of all samples: it differs from that of a round with other labels or weights."""
        value: int = google_crc32c.value(self._index["checksum"].tobytes())
        return value

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
            if not len(chosen):  # most slices
                continue
            path, start, middle, end = self._span(index)
            with path.open("r+b") as file:
                file.seek(start)
                content = bytearray(file.read(end - start))
                weights = np.frombuffer(content, dtype=np.uint8)[middle - start :]
                weights[chosen] = 0
                file.seek(middle)
                file.write(weights.tobytes())
            checksums[index] = google_crc32c.value(bytes(content))
        self._index["checksum"] = checksums
        save_table(self._folder / INDEX, self._index)

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
            raise damaged(path, str(error.strerror)) from error
        if google_crc32c.value(content) != self._index["checksum"][index]:
            raise damaged(path, f"the checksum of sample {index} differs")
        return content

    def _span(self, index: int) -> tuple[Path, int, int, int]:
        """The file of one sample, and the offsets in it where labels begin, where weights begin, and where both end."""
        pixels = int(np.prod(self._index["shape"][index]))
        start = int(self._index["offset"][index])
        middle = start + pixels * (self._planes or self._dtype.itemsize)
        return rank_files(self._folder, int(self._index["rank"][index]))[0], start, middle, middle + pixels

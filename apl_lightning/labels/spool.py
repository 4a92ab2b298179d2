"""What a denoiser keeps of each batch until it has seen the whole data set."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from apl_lightning._support.files import explaining_disk_errors
from apl_lightning.labels.target_images import ImageBatch


class Spool:
    """Keeps tensors in memory, up to `memory` bytes, and then in files of `folder`; returns them on `device`."""

    def __init__(self, folder: Path, rank: int, device: torch.device, memory: int = 2**29) -> None:
        self._folder = folder
        self._rank = rank
        self._device = device
        self._memory = memory
        self._batches: list[tuple[ImageBatch, list[Tensor]] | Path] = []

    def put(self, batch: ImageBatch, observed: tuple[Tensor, ...]) -> None:
        """Keep a batch without its images."""
        without_images = batch._replace(images=batch.images.new_empty(batch.images.shape, device="meta"))
        kept = [tensor.cpu() for tensor in observed]
        self._memory -= sum(tensor.nbytes for tensor in (*kept, *batch.references) if tensor is not None)
        if self._memory >= 0:
            self._batches.append((without_images, kept))
            return
        path = self._folder / f"spool-{self._rank:05d}-{len(self._batches):06d}.pt"
        what = "what the denoiser keeps until all images are predicted"
        # With a path in place of a file, torch hides the reason of an error.
        with explaining_disk_errors(self._folder, what), path.open("wb") as file:
            torch.save((without_images._asdict(), kept), file)
        self._batches.append(path)

    def __iter__(self) -> Iterator[tuple[ImageBatch, list[Tensor]]]:
        for entry in self._batches:
            if isinstance(entry, Path):
                fields, kept = torch.load(entry, weights_only=True)
                entry.unlink()
                entry = ImageBatch(**fields), kept
            batch, kept = entry
            yield batch, [tensor.to(self._device) for tensor in kept]

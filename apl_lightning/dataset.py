"""Target images joined with their pseudo labels, sample by sample."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from apl_lightning.randomness import derived_seed, drawing_from
from apl_lightning.sampler import Draw
from apl_lightning.samples import Keys, read_sample
from apl_lightning.store import PseudoLabelStore
from apl_lightning.transforms import Transform, check_alignment, transform_jointly

_PROBES = 4


class TargetDataset(Dataset[Any]):
    """Unlabelled target images, each with the pseudo label and the weight of the current round.

    A sample is a dictionary: `image` (C, *S), `pseudo_label` (*S), `weight` (*S) in [0, 1], `index`, `round` (the
    round that made the label) and `repeated` (whether it only fills up a batch and counts for nothing). Labels are
    made on the image as the data set gives it, so the data set itself must be deterministic: what is random belongs
    into `transform`, which moves the three together.

    Args:
        dataset: A map-style data set of tensors, `(image, label)` or dictionaries. A label in it is never read by
            anything that trains; it only serves the diagnosis `pseudo/dice`.
        directory: Where the labels are kept.
        transform: Takes and returns a dictionary with `image` (C, *S), `pseudo_label` (1, *S) and `weight`
            (1, *S): a MONAI dictionary transform with these keys, or any callable.
        image_key: The key of the image in dictionaries.
        label_key: The key of the reference label in dictionaries.
        case_key: The key of the case (patient) in dictionaries.
        seed: What the transform draws depends on it, on the epoch and on the index, and on nothing else.

    It is read by index, or by what [`EpochSampler`][apl_lightning.EpochSampler] draws.

    Raises:
        TypeError: If `dataset` is no map-style data set, or its samples have another form.
        ValueError: If it is empty or random, if the transform parts image and label, or if `directory` holds the
            labels of another data set.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        directory: str | Path,
        transform: Transform | None = None,
        image_key: str = "image",
        label_key: str = "label",
        case_key: str = "case",
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.transform = transform
        self.keys = Keys(image_key, label_key, case_key)
        length = _length(dataset)
        image = self.read(0)["image"]
        self.size = image.shape[1:]
        self._check_deterministic(length)
        if transform is not None:
            check_alignment(transform, image)
        self.store = PseudoLabelStore(directory, length, self._identity(length))

    def __len__(self) -> int:
        return self.store.length

    def __getitem__(self, drawn: int | Draw) -> Any:
        draw = drawn if isinstance(drawn, Draw) else Draw(drawn, epoch=0, repeated=False)
        index = draw.index
        labels, weights, round = self.store.read(index)
        weights = torch.zeros_like(weights) if draw.repeated else weights
        sample = {"image": self.read_named(index)["image"], "pseudo_label": labels, "weight": weights}
        moved = [sample]
        if self.transform is not None:
            with drawing_from(derived_seed(self.seed, draw.epoch, index), self.transform):
                moved = transform_jointly(self.transform, sample)
        samples = [{**item, "index": index, "round": round, "repeated": draw.repeated} for item in moved]
        return samples if len(samples) > 1 else samples[0]

    def read(self, index: int) -> dict[str, Any]:
        """The untransformed sample, as `{"image"}` and, where the data set has them, `"label"` and `"case"`."""
        return read_sample(self.dataset[index], self.keys, index)

    def read_named(self, index: int) -> dict[str, Any]:
        """As `read`; an error names the sample.

        Raises:
            RuntimeError: If the data set cannot read it.
        """
        try:
            return self.read(index)
        except Exception as error:
            raise RuntimeError(f"sample {index}: {type(error).__name__}: {error}") from error

    def _check_deterministic(self, length: int) -> None:
        for index in sorted({step * (length - 1) // max(1, _PROBES - 1) for step in range(_PROBES)}):
            first, second = (self.read(index)["image"] for _ in range(2))
            if first.shape != second.shape or not torch.equal(first, second):
                raise ValueError(
                    f"Expected the data set to give the same image for the same index, but sample {index} differs "
                    "when read twice: its pseudo label would not fit. Take the random transforms out of the data set "
                    "and pass them as `transform`, which moves image, pseudo label and weight together."
                )

    def _identity(self, length: int) -> str:
        digest = hashlib.sha256()
        for index in sorted({0, length // 2, length - 1}):
            digest.update(self.read(index)["image"].contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class LabelledDataset(Dataset[dict[str, Any]]):
    """Validation images with their labels, as `{"image", "label", "case", "index"}`.

    `index` lets the Dice count a sample once that a distributed sampler gave to two ranks. A sample without a case
    is a case of its own.
    """

    def __init__(self, dataset: Dataset[Any], keys: Keys) -> None:
        self.dataset = dataset
        self.keys = keys
        self._length = _length(dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = read_sample(self.dataset[index], self.keys, index)
        if "label" not in sample:
            raise ValueError(
                f"Expected validation samples with a label, but sample {index} has none: pass `label_key`."
            )
        return {"case": str(index), **sample, "index": index}


def _length(dataset: object) -> int:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"Expected a map-style data set with `__len__` and `__getitem__`, but got {type(dataset).__name__}: "
            "pseudo labels belong to an index; wrap the data set, not its loader."
        )
    if len(dataset) == 0:
        raise ValueError("Expected at least one sample, but the data set is empty: check its paths.")
    return len(dataset)

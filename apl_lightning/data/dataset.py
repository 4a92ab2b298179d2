"""Target images joined with their pseudo labels, and images for evaluation."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from apl_lightning._support.seeding import derived_seed, seeded
from apl_lightning.data.alignment import check_alignment
from apl_lightning.data.fingerprints import check_fingerprint, fingerprint
from apl_lightning.data.joined_datasets import read_joined
from apl_lightning.data.joint_transforms import Transform, transform_jointly
from apl_lightning.data.random_patches import RandomPatches
from apl_lightning.data.sample_format import Keys, length_of, read_sample, warn_of_unread_label
from apl_lightning.data.sampler import DrawnSample
from apl_lightning.data.unopened import unopened_copy
from apl_lightning.store import PseudoLabelStore

_PROBES = 4


class TargetDataset(Dataset[Any]):
    """Unlabelled target images, each with the pseudo label and the weight of the current round.

    A sample is a dictionary: `image` (C, *S), `pseudo_label` (*S), `weight` (*S) in [0, 1], `index`, `round` (the
    round of the label) and `repeated` (whether the sample only fills up a batch and does not count). It is read by
    index, or by what [`EpochSampler`][apl_lightning.data.EpochSampler] draws.

    Labels are made on the image as the data set returns it, so the data set must be deterministic. Random transforms
    belong in `transform`, which moves image, label and weight together.

    Args:
        dataset: A map-style data set of tensors, `(image, label)` or dictionaries. Nothing that trains reads its
            labels; they only serve the diagnosis `pseudo/dice`.
        directory: The folder of the pseudo labels.
        transform: Takes and returns a dictionary with `image` (C, *S), `pseudo_label` (1, *S) and `weight`
            (1, *S): a MONAI dictionary transform with these keys, or any callable.
        keys: The keys of samples that are dictionaries.
        seed: Patches and the transform draw from (seed, pass over the data set, index).
        patches: Draws patches of each image, which `transform` then moves one by one; a sample is a list of them.
        has_workers: Whether worker processes read it. Then this process reads a copy (a few samples, as a check).

    Raises:
        TypeError: If `dataset` is not a map-style data set, or its samples have another form.
        ValueError: If it is empty or random, if the transform separates image and label, or if an image is not the
            one that its pseudo label was made on.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        directory: str | Path,
        transform: Transform | None = None,
        keys: Keys = Keys(),  # noqa: B008 - it is immutable
        seed: int = 0,
        patches: RandomPatches | None = None,
        has_workers: bool = False,
    ) -> None:
        self.dataset = dataset
        self._own = unopened_copy(dataset) if has_workers else dataset  # what the main process reads
        self.seed = seed
        self.transform = transform
        self.patches = patches
        self.keys = keys
        length = length_of(dataset)
        sample = self._own[0]
        image = read_sample(sample, keys, index=0)["image"]
        warn_of_unread_label(sample, image, keys)
        self.size = image.shape[1:]
        self._check_deterministic(length)
        if patches is not None:
            with seeded(0, patches):  # the same on all ranks
                image = patches.patches_of(image[None])[0]
        if transform is not None:
            check_alignment(transform, image)
        self.store = PseudoLabelStore(directory, length)

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy, whose files may be open: a worker that is spawned opens them itself."""
        return {**vars(self), "_own": self.dataset}

    def __len__(self) -> int:
        return self.store.length

    def __getitem__(self, drawn: int | DrawnSample) -> Any:
        if not isinstance(drawn, DrawnSample):  # of another sampler: the transforms draw as in any data set
            drawn = DrawnSample(drawn, turn=int(torch.randint(2**31, ())), repeated=False)
        index = drawn.index
        labels, weights, round = self.store.read(index)
        weights = torch.zeros_like(weights) if drawn.repeated else weights
        image = self.read(index)["image"]
        check_fingerprint(fingerprint(image), self.store.fingerprint(index), index)
        sample = {"image": image, "pseudo_label": labels, "weight": weights}
        moved, seed = [sample], (self.seed, drawn.turn, index)
        if self.patches is not None:
            with seeded(derived_seed(*seed, 1), self.patches):  # else the first draws of both would be the same
                moved = transform_jointly(self.patches, sample)
        if self.transform is not None:
            # Copies: a transform may work in place, and the image may be the data set's own.
            given = [{**each, "image": each["image"].clone()} for each in moved]
            with seeded(derived_seed(*seed), self.transform):
                moved = [item for each in given for item in transform_jointly(self.transform, each)]
        samples = [{**item, "index": index, "round": round, "repeated": drawn.repeated} for item in moved]
        return samples if len(samples) > 1 else samples[0]

    def read(self, index: int) -> dict[str, Any]:
        """The untransformed sample, as `{"image"}` with `"label"` and `"case"` if the data set has them.

        Raises:
            RuntimeError: If the data set cannot read it; names the sample.
        """
        try:
            return read_joined(self.dataset if get_worker_info() else self._own, self.keys, index)
        except Exception as error:
            raise RuntimeError(f"sample {index}: {type(error).__name__}: {error}") from error

    def check_labelled_images(self) -> None:
        """Raise a `ValueError` if one of a few images is not the one that its pseudo label was made on."""
        for index in _probes(len(self)):
            check_fingerprint(fingerprint(self.read(index)["image"]), self.store.fingerprint(index), index)

    def _check_deterministic(self, length: int) -> None:
        for index in _probes(length):
            first, second = (read_sample(self._own[index], self.keys, index)["image"] for _ in range(2))
            if first.shape != second.shape or not torch.equal(first, second):
                raise ValueError(
                    f"Expected the data set to give the same image for the same index, but sample {index} differs "
                    "when read twice: its pseudo label would not fit. Take the random transforms out of the data set "
                    "and pass them as `transform`, which moves image, pseudo label and weight together."
                )


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Images for validation, test or prediction, as `{"image", "case", "dataset_index"}` with `"label"` if labelled.

    A sample without a case is its own case. With `dataset_index`, a sample that a distributed sampler gives to two
    ranks counts once.
    """

    def __init__(self, dataset: Dataset[Any], keys: Keys, labelled: bool) -> None:
        self.dataset = dataset
        self.keys = keys
        self.labelled = labelled
        self._length = length_of(dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = read_joined(self.dataset, self.keys, index)
        if self.labelled and "label" not in sample:
            raise ValueError(
                f"Expected evaluation samples to have a label, but sample {index} has none: return `(image, label)`, "
                "or a dictionary and pass `label_key`."
            )
        if not self.labelled:
            sample.pop("label", None)  # of some samples only, it could not be stacked
        return {"case": str(index), **sample, "dataset_index": index}


def _probes(length: int) -> list[int]:
    """A few evenly spaced indices."""
    return sorted({step * (length - 1) // (_PROBES - 1) for step in range(_PROBES)})

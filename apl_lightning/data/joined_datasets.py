"""Samples of data sets that are joined from several, such as the folders of two hospitals."""

from bisect import bisect_right
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset

from apl_lightning.data.project import CollatedDataset
from apl_lightning.data.sample_format import Keys, read_sample


def read_joined(dataset: Dataset[Any], keys: Keys, index: int) -> dict[str, Any]:
    """The sample of a data set as of `read_sample`; in a `ConcatDataset` its case belongs to its part alone.

    Two folders may have a patient of one name, and slices of two patients make no volume.
    """
    sample = read_sample(dataset[index], keys, index)
    if "case" in sample:
        sample["case"] = "/".join(map(str, (*_parts_of(dataset, index), sample["case"])))
    return sample


def _parts_of(dataset: Any, index: int) -> list[int]:
    """The number of the part of a `ConcatDataset` that a sample is in, and so on within it: a + b + c has two."""
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return [part, *_parts_of(dataset.datasets[part], index - before)]
    if isinstance(dataset, Subset):
        return _parts_of(dataset.dataset, dataset.indices[index])
    return _parts_of(dataset.dataset, index) if isinstance(dataset, CollatedDataset) else []

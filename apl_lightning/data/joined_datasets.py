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
    part = _part_of(dataset, index)
    if "case" in sample and part is not None:
        sample["case"] = f"{part}/{sample['case']}"
    return sample


def _part_of(dataset: Any, index: int) -> int | None:
    """The number of the part of a `ConcatDataset` that a sample is in."""
    if isinstance(dataset, ConcatDataset):
        return bisect_right(dataset.cumulative_sizes, index)
    if isinstance(dataset, Subset):
        return _part_of(dataset.dataset, dataset.indices[index])
    return _part_of(dataset.dataset, index) if isinstance(dataset, CollatedDataset) else None

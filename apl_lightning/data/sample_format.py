"""Samples and batches as projects have them: a tensor, (image, label), or a dictionary."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset


@dataclass(frozen=True)
class Keys:
    """The dictionary keys of image, label and case."""

    image: str = "image"
    label: str = "label"
    case: str = "case"

    def of(self, sample: Mapping[Any, Any]) -> "Keys":
        """The keys of a sample or batch: `pixel_values` and `labels`, as Hugging Face has them, if it lacks `image`."""
        if self.image != "image" or "image" in sample or "pixel_values" not in sample:
            return self
        found = replace(self, image="pixel_values")
        return found if self.label != "label" or "label" in sample else replace(found, label="labels")


def read_sample(sample: object, keys: Keys, index: int) -> dict[str, Any]:
    """Convert a sample to `{"image": (C, *S)}` in float32, with `"label"` (*S) and `"case"` if it has them.

    Raises:
        TypeError: If the sample has another form, or its image is not a floating point tensor.
        ValueError: If image and label do not match, the image contains NaN or infinity, or the label has
            fractions.
    """
    parts = parts_of(sample, keys, index)
    image = as_tensor(parts["image"])
    if image is None or not image.is_floating_point() or image.ndim < 2:
        raise TypeError(
            f"Expected the image of sample {index} to be a floating point tensor of shape (C, *S), but got "
            f"{describe(parts['image'])}: convert it in the data set (`torch.from_numpy(image).float()`)."
        )
    if not bool(torch.isfinite(image).all()):
        raise ValueError(
            f"Expected finite values in the image of sample {index}, but got NaN or infinity: replace them in the data "
            "set, as `torch.nan_to_num` does."
        )
    result: dict[str, Any] = {"image": image.float()}
    if parts.get("label") is not None:
        result["label"] = _label(parts["label"], image, index)
    if (case := _name(parts.get("case"))) is not None:
        result["case"] = case
    return result


def split_batch(batch: object, keys: Keys) -> tuple[Tensor, Tensor | None, list[str | None] | None]:
    """Image (B, C, *S), label (B, *S) or `None`, and the cases if known (each `None` if empty), of a batch."""
    parts = parts_of(batch, keys)
    image, label, cases = parts["image"], parts.get("label"), parts.get("case")
    if isinstance(label, Tensor) and label.ndim == image.ndim and label.shape[1] == 1:
        label = label[:, 0]
    label = _class_indices(label, "a batch") if isinstance(label, Tensor) else label
    return image, label, None if cases is None else [_name(case) for case in cases]


def parts_of(sample: object, keys: Keys, index: int | None = None) -> dict[str, Any]:
    """Image, label and case, as far as they are there, in a sample of this index or, without one, in a batch."""
    if isinstance(sample, Mapping):
        keys = keys.of(sample)
        if keys.image not in sample:
            raise TypeError(
                f"Expected a sample with the key {keys.image!r}, but got the keys {sorted(map(str, sample))}: pass "
                "`image_key`."
            )
        names = {"image": keys.image, "label": keys.label, "case": keys.case}
        return {name: sample[key] for name, key in names.items() if key in sample}
    if isinstance(sample, list) and isinstance(sample[0] if sample else None, Mapping):
        if index is None:
            raise TypeError(
                f"Expected a batch of stacked images, but got a list of {len(sample)} dictionaries: let `collate_fn` "
                "stack them, as torch's default one does."
            )
        raise TypeError(
            f"Expected sample {index} to be one image, but got a list of {len(sample)} dictionaries: take random crops "
            "out of the data set and pass them as `transform`, which crops image, pseudo label and weight together."
        )
    if isinstance(sample, tuple | list) and 1 <= len(sample) <= 2:
        return dict(zip(("image", "label"), sample, strict=False))
    if isinstance(sample, Tensor | np.ndarray):
        return {"image": sample}
    where = "a batch" if index is None else f"sample {index}"
    many = f" of {len(sample)}: return a dictionary" if isinstance(sample, tuple | list) else ""
    raise TypeError(
        f"Expected {where} to be a tensor, (image, label) or a dictionary, but got {describe(sample)}{many}."
    )


def _label(value: object, image: Tensor, index: int) -> Tensor:
    label = as_tensor(value)
    if label is not None and label.ndim == image.ndim and label.shape[0] == 1:
        label = label[0]
    if label is None or label.shape != image.shape[1:]:
        raise ValueError(
            f"Expected the label of sample {index} to have shape {tuple(image.shape[1:])}, like its image, but got "
            f"{describe(value)}: return the image alone if it has no label map."
        )
    return _class_indices(label, f"sample {index}")


def _class_indices(label: Tensor, where: str) -> Tensor:
    if label.is_floating_point() and not bool((label == label.round()).all()):
        raise ValueError(
            f"Expected class indices in the label of {where}, but got fractions from {label.min():g} to "
            f"{label.max():g}: do not scale labels (as `to_tensor` does), and resize them with the nearest neighbour."
        )
    return label.long()


def _name(case: object) -> str | None:
    """The name of a case; `None` if it is empty."""
    plain = case.item() if isinstance(case, Tensor) else case
    return None if plain is None else str(plain) or None


def warn_of_unread_label(sample: object, image: Tensor, keys: Keys) -> None:
    """Warn if a sample has no label at its key, but integers of the size of the image at another one."""
    if not isinstance(sample, Mapping) or (keys := keys.of(sample)).label in sample:
        return
    for key, value in sample.items():
        tensor = as_tensor(value)
        if key == keys.image or tensor is None or tensor.is_floating_point() or tensor.is_complex():
            continue
        if tensor.shape in (image.shape[1:], (1, *image.shape[1:])):
            warnings.warn(
                f"The samples have no {keys.label!r}, but {key!r} looks like a label. It is not read: pass "
                f"label_key={key!r} to see `pseudo/dice` and the Dice of validation.",
                stacklevel=2,
            )


def as_tensor(value: object) -> Tensor | None:
    """An array or a tensor as a plain tensor; `None` for anything else."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, Tensor):
        strip = getattr(value, "as_tensor", None)  # MONAI's MetaTensor
        return strip() if callable(strip) else value
    return None


def describe(value: object) -> str:
    """The type and shape of a value, for messages."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of {value.dtype} with shape {tuple(value.shape)}"
    return type(value).__name__


def length_of(dataset: object) -> int:
    """The number of samples of a map-style data set; a `TypeError` or a `ValueError` if it is none, or empty."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"Expected a map-style data set with `__len__` and `__getitem__`, but got {type(dataset).__name__}: "
            "samples are read by their index; wrap the data set, not its loader."
        )
    if isinstance(dataset, str | Mapping):
        raise TypeError(
            f"Expected a data set of images, but got {dataset!r:.60}: pass a data set that reads the files, such as "
            "`monai.data.Dataset`, or a list of images."
        )
    if len(dataset) == 0:
        raise ValueError("Expected at least one sample, but the data set is empty: check its paths.")
    return len(dataset)

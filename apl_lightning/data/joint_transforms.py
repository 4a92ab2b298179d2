"""Joint transforms move image, pseudo label and weight together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apl_lightning._support.soft_labels import is_soft
from apl_lightning.data.sample_format import as_tensor, describe

Transform = Callable[[dict[str, Any]], Any]
TARGET_KEYS = ("image", "pseudo_label", "weight")


def transform_jointly(transform: Transform, sample: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Apply `transform` to `{"image" (C, *S), "pseudo_label" (1, *S), "weight" (1, *S)}` and check the result.

    A soft pseudo label has one channel per class. Returns the transformed samples (several if the transform draws
    several patches), label and weight as (*S), a soft label as (C, *S).

    Raises:
        ValueError: If the transform drops a key, changes the shape of one of the three alone, interpolates labels, or
            makes NaN or infinity.
    """
    soft = is_soft(sample["pseudo_label"], sample["weight"])
    with_channels = ("image", "pseudo_label") if soft else ("image",)
    given = {key: sample[key] if key in with_channels else sample[key][None] for key in TARGET_KEYS}
    result = transform(given)
    return [_checked(item, soft) for item in (result if isinstance(result, list | tuple) else [result])]


def _checked(result: object, soft: bool) -> dict[str, Tensor]:
    found = [as_tensor(result.get(key)) for key in TARGET_KEYS] if isinstance(result, dict) else []
    tensors = [tensor for tensor in found if tensor is not None]
    if len(tensors) < len(TARGET_KEYS):
        raise ValueError(f"Expected `transform` to return a dictionary with {TARGET_KEYS}, but got {describe(result)}.")
    image, label, weight = tensors
    if not label.shape[1:] == weight.shape[1:] == image.shape[1:] or len(weight) != 1 or (len(label) != 1 and not soft):
        raise ValueError(
            f"Expected `transform` to keep image, pseudo label and weight alike, but got shapes {tuple(image.shape)}, "
            f"{tuple(label.shape)} and {tuple(weight.shape)}: give its spatial part all of keys={list(TARGET_KEYS)}."
        )
    if not soft and label.is_floating_point() and not torch.equal(label, label.round()):
        raise ValueError(
            "Expected `transform` to keep labels whole, but it interpolates them: use mode='nearest' for "
            "'pseudo_label'."
        )
    for key, tensor in zip(TARGET_KEYS, tensors, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Expected `transform` to return a finite {key!r}, but got NaN or infinity: mend the transform."
            )
    label = label.float().clamp(0, 1) if soft else label[0].long()
    return {"image": image.float(), "pseudo_label": label, "weight": weight[0].float().clamp(0, 1)}

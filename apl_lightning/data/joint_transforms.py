"""Joint transforms move image, pseudo label and weight together; a check proves it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apl_lightning._support.resizing import pool_to
from apl_lightning._support.seeding import seeded
from apl_lightning._support.soft_labels import is_soft
from apl_lightning.data.sample_format import as_tensor, describe

Transform = Callable[[dict[str, Any]], Any]
TARGET_KEYS = ("image", "pseudo_label", "weight")

_DRAWS = 16
_LEAST_CORRELATION = 0.15
_CELLS = 8


def transform_jointly(transform: Transform, sample: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Apply `transform` to `{"image" (C, *S), "pseudo_label" (1, *S), "weight" (1, *S)}` and check the result.

    A soft pseudo label has one channel per class. Returns the transformed samples (several if the transform draws
    several patches), label and weight as (*S), a soft label as (C, *S).

    Raises:
        ValueError: If the transform drops a key, changes the shape of one of the three alone, or interpolates labels.
    """
    soft = is_soft(sample["pseudo_label"], sample["weight"])
    with_channels = ("image", "pseudo_label") if soft else ("image",)
    given = {key: sample[key] if key in with_channels else sample[key][None] for key in TARGET_KEYS}
    result = transform(given)
    return [_checked(item, soft) for item in (result if isinstance(result, list | tuple) else [result])]


def check_alignment(transform: Transform, image: Tensor) -> None:
    """Raise a `ValueError` unless `transform` moves image and label together, on patterns in the shape of `image`.

    Image and label show the same random pattern. After the transform they must still be correlated, positively or
    negatively, whatever happens to the intensities. Averages over coarse cells remove noise.
    """
    transform = copy.deepcopy(transform)
    with seeded(0, transform):  # by default, MONAI transforms share one random state
        for draw in range(_DRAWS):
            pattern = _pattern(image.shape[1:], seed=draw)
            stand_in = pattern.to(image.dtype).expand_as(image).clone()
            sample = {"image": stand_in, "pseudo_label": pattern, "weight": pattern.float()}
            for moved in transform_jointly(transform, sample):
                correlation = _correlation(moved["image"].float().mean(dim=0), moved["pseudo_label"].float())
                if correlation is not None and abs(correlation) < _LEAST_CORRELATION:
                    raise ValueError(
                        "Expected `transform` to move image, pseudo label and weight together, but on a test pattern "
                        f"image and label came out with a correlation of {correlation:.2f}: give its spatial part "
                        f"all of keys={list(TARGET_KEYS)}."
                    )


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
    label = label.float().clamp(0, 1) if soft else label[0].long()
    return {"image": image, "pseudo_label": label, "weight": weight[0].float().clamp(0, 1)}


def _pattern(shape: torch.Size, seed: int) -> Tensor:
    """A smooth random field, cut at its median into 0 and 1, without symmetries."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.meshgrid(*[torch.linspace(0, 1, size) for size in shape], indexing="ij")
    field = torch.zeros(shape)
    for _ in range(12):
        frequencies = (torch.rand(len(shape), generator=generator) * 2 - 1) * 4 * torch.pi
        phase = torch.rand((), generator=generator) * 2 * torch.pi
        field += torch.cos(sum((f * grid for f, grid in zip(frequencies, grids, strict=True)), start=phase))
    return (field > field.median()).long()


def _correlation(image: Tensor, label: Tensor) -> float | None:
    """The correlation of two (*S) over coarse cells; `None` if one of them is nearly constant."""
    if not 0.2 < label.mean() < 0.8:
        return None
    first, second = (_coarse(values) - values.mean() for values in (image, label))
    norm = first.norm() * second.norm()
    return float(first.flatten() @ second.flatten() / norm) if norm > 1e-6 else None


def _coarse(values: Tensor) -> Tensor:
    cells = [min(_CELLS, size) for size in values.shape]
    return pool_to(values[None, None], cells)[0, 0]

"""Prove on test patterns that a joint transform moves image, pseudo label and weight together."""

import copy
import math

import torch
from torch import Tensor

from apl_lightning._support.seeding import seeded
from apl_lightning.data.joint_transforms import TARGET_KEYS, Transform, transform_jointly

_PERIOD = 8  # of the waves, in pixels
_FIRST, _LAST = 0.1, 0.9  # the weights of the first and the last pixel; outside the image the weight is 0
_PIXELS = 2**21  # of all test patterns together
_FEWEST_DRAWS, _MOST_DRAWS = 16, 64
_FEWEST_CELLS = 4  # fewer prove nothing
_LEAST_EXPLAINED = 0.06  # of the variance; noise alone explains 2 / 64
# In pixels. What is interpolated as "nearest" comes out shifted by up to half a pixel of the result.
_LARGEST_SHIFT = 1.5
_LARGEST_SPREAD = {"image": 0.6, "pseudo label": 1.0}


def check_alignment(transform: Transform, image: Tensor) -> None:
    """Raise a `ValueError` unless `transform` moves image, label and weight together, on patterns shaped as `image`.

    A pattern depends on one coordinate x, in a random direction. The weight is a ramp, and tells x after the transform.
    The image is a cosine wave of x, and the label is 1 where the wave is positive. In each cell of the result a
    least-squares fit of `1, cos(k x), sin(k x)` gives the phase of both waves, and so their displacement from the
    weight in pixels. Noise, blur, contrast, brightness and gamma of the image change its phase little.
    """
    draws = min(_MOST_DRAWS, max(_FEWEST_DRAWS, _PIXELS // image[0].numel()))
    transform = _copy(transform)
    with seeded(0, transform):  # by default, MONAI transforms share one random state
        for _ in range(draws):
            x = _coordinate(image.shape[1:])
            phase = 2 * math.pi * float(torch.rand(()))
            for moved in _transformed(transform, _pattern(image, x, phase)):
                _check(moved, float(x.max()), phase)


def _copy(transform: Transform) -> Transform:
    try:
        return copy.deepcopy(transform)
    except Exception:  # it holds a lock or an open file, say; then its own random state moves on
        return transform


def _transformed(transform: Transform, pattern: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    try:
        return transform_jointly(transform, pattern)
    except ValueError:
        raise
    except Exception as error:  # the user's code
        raise ValueError(
            f"Expected `transform` to accept an image of shape (C, *S) = {tuple(pattern['image'].shape)} with a label "
            f"and a weight, but it raised {type(error).__name__}: {error}. Images need a channel dimension, as "
            "`image[None]` adds in the data set."
        ) from error


def _coordinate(size: torch.Size) -> Tensor:
    """The distance of each pixel (*S) from a corner along a random direction, in pixels."""
    direction = torch.randn(len(size))
    axes = [length * torch.arange(pixels) for length, pixels in zip(direction / direction.norm(), size, strict=True)]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(dim=0)
    return x - x.min()


def _pattern(image: Tensor, x: Tensor, phase: float) -> dict[str, Tensor]:
    wave = torch.cos(2 * math.pi * x / _PERIOD + phase)
    low, high = (float(value) for value in image.aminmax())
    intensities = low + ((high - low) or 1.0) * (1 + wave) / 2
    return {
        "image": intensities.to(image.dtype).expand_as(image).clone(),
        "pseudo_label": (wave > 0).long(),
        "weight": _FIRST + (_LAST - _FIRST) * x / x.max().clamp(min=1),
    }


def _check(moved: dict[str, Tensor], length: float, phase: float) -> None:
    weight = moved["weight"]
    inside = weight > _FIRST / 2
    x = (weight - _FIRST) / (_LAST - _FIRST) * max(1.0, length)
    step = max(1.0, _step(x, inside))
    for name, values in (
        ("image", moved["image"].float().mean(dim=0)),
        ("pseudo label", moved["pseudo_label"].float()),
    ):
        shift, spread = _displacement(values, 2 * math.pi * x / _PERIOD + phase, inside)
        if shift > _LARGEST_SHIFT * step or spread > _LARGEST_SPREAD[name] * step:
            raise ValueError(
                "Expected `transform` to move image, pseudo label and weight together, but on a test pattern the "
                f"{name} lies about {max(shift, spread):.1f} pixels away from the weight: give its spatial part all of "
                f"keys={list(TARGET_KEYS)}."
            )


def _step(x: Tensor, inside: Tensor) -> float:
    """How far neighbouring pixels of the result lie apart in the image, in pixels."""
    steps = []
    for axis in range(x.ndim):
        both = inside.narrow(axis, 1, x.shape[axis] - 1) & inside.narrow(axis, 0, x.shape[axis] - 1)
        steps.append(x.diff(dim=axis).abs()[both].sum() / both.sum().clamp(min=1))
    return float(torch.stack(steps).norm())


def _displacement(values: Tensor, angle: Tensor, inside: Tensor) -> tuple[float, float]:
    """How far a wave in `values` (*S) lies from `angle` (*S), in pixels: the median of the cells and the spread.

    A spread that noise explains does not count.
    """
    weights, signal = _cells(inside.float()), _cells(values)
    count = weights.sum(dim=1)
    signal = signal - (weights * signal).sum(dim=1, keepdim=True) / count[:, None].clamp(min=1)
    power = (weights * signal.square()).sum(dim=1)
    basis = torch.stack([torch.ones_like(signal), _cells(angle.cos()), _cells(angle.sin())], dim=-1)
    gram = torch.einsum("npi,np,npj->nij", basis, weights, basis)
    # Cells inside the image, with a wave, and with enough of x to fit it.
    used = (count > 0.75 * signal.shape[1]) & (power > 1e-3 * power.max()) & (torch.linalg.det(gram) > 0.01 * count**3)
    if used.sum() < _FEWEST_CELLS:
        return 0.0, 0.0
    gram, power, count = gram[used], power[used], count[used]
    moment = torch.einsum("npi,np,np->ni", basis, weights, signal)[used]
    fit = torch.linalg.solve(gram, moment)
    explained = (fit * moment).sum(dim=1)
    if explained.sum() < _LEAST_EXPLAINED * power.sum():
        return _PERIOD / 2, 0.0
    _, cosine, sine = fit.unbind(dim=1)
    sign = 1.0 if cosine.sum() >= 0 else -1.0  # an inverted contrast is no displacement
    shifts = torch.atan2(sign * sine, sign * cosine)
    noise = (2 * (power - explained).clamp(min=0) / count**2 / (cosine.square() + sine.square())).sqrt()
    spread = (shifts - shifts.median()).abs().quantile(0.75) - 2 * noise.median()
    pixels = _PERIOD / (2 * math.pi)
    return abs(float(shifts.median())) * pixels, float(spread) * pixels


def _cells(values: Tensor) -> Tensor:
    """(*S) cut into cells of one period along each axis, (cells, pixels); what is left over at the end is dropped."""
    for axis in range(values.ndim):
        length = min(_PERIOD, values.shape[2 * axis])
        values = values.narrow(2 * axis, 0, values.shape[2 * axis] // length * length)
        values = values.unflatten(2 * axis, (-1, length))
    order = [*range(0, values.ndim, 2), *range(1, values.ndim, 2)]
    cells = math.prod(values.shape[0::2])
    return values.permute(order).reshape(cells, -1)

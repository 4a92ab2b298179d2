"""Prove on test patterns that a joint transform moves image, pseudo label and weight together."""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from apl_lightning._support.seeding import seeded
from apl_lightning.data.joint_transforms import TARGET_KEYS, Transform, transform_jointly

_FIRST, _LAST = 0.1, 0.9  # the weights of the first and the last pixel; outside the image the weight is 0
_PIXELS = 2**21  # of all test patterns together
_FEWEST_DRAWS, _MOST_DRAWS = 4, 64
_LARGEST_RESULT = 128  # pixels along an axis that are compared
# A cell is compared if so much of it lies in the image, shows a wave, and has coordinates of its own.
_INSIDE, _POWER, _DETERMINANT = 0.75, 1e-3, 0.01
_FEWEST_CELLS = 4  # fewer prove nothing
_LOST, _CLEAR = 0.06, 0.25  # a wave that explains less of the variance is lost, and proves nothing below the second
# In pixels. What is interpolated as "nearest" comes out shifted by up to half a pixel of the result.
_LARGEST_SHIFT = 1.5
_LARGEST_SPREAD = {"image": 0.6, "pseudo label": 1.0}


class Wave(NamedTuple):
    """A plane wave on an image: the coordinate of each pixel along its direction (*S), its period, its phase."""

    x: Tensor
    period: int
    phase: float

    def angle(self, x: Tensor) -> Tensor:
        """The angle of the wave at coordinates x."""
        return 2 * math.pi * x / self.period + self.phase


def check_alignment(transform: Transform, image: Tensor) -> None:
    """Raise a `ValueError` unless `transform` moves image, label and weight together, on patterns shaped as `image`.

    A pattern depends on one coordinate x, in a random direction. The weight is a ramp, and tells x after the transform,
    which must keep the values of the weight. The image is a cosine wave of x, and the label is 1 where the wave is
    positive. In each cell of the result a least-squares fit of `1, cos(k x), sin(k x)` gives the phase of both waves,
    and so their displacement from the weight in pixels. Noise, blur, contrast, brightness and gamma of the image change
    its phase little. An error needs two patterns, as intensity transforms may destroy a wave now and then.
    """
    draws = min(_MOST_DRAWS, max(_FEWEST_DRAWS, _PIXELS // image[0].numel()))
    transform = _copy(transform)
    found: list[str] = []
    lost = 0
    with seeded(0, transform):  # by default, MONAI transforms share one random state
        for _ in range(draws):
            wave = _draw_wave(image.shape[1:])
            moved = _transformed(transform, _pattern(image, wave))
            reports = [report for item in moved for report in _reports(item, wave)]
            lost += any(math.isnan(distance) for _, distance in reports)
            off = [f"{name} lies about {distance:.1f} pixels away" for name, distance in reports if distance > 0]
            found += [f"{what} from the weight" for what in off[:1]]
            if len(found) > 1 or lost > max(1, draws // 6):
                what = found[0] if found else "wave of the image is lost"
                raise ValueError(
                    "Expected `transform` to move image, pseudo label and weight together, but on test patterns the "
                    f"{what}: give its spatial part all of keys={list(TARGET_KEYS)}, and let it keep the values of "
                    f"'weight' and image waves of {wave.period} pixels."
                )


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
        shape = tuple(pattern["image"].shape)
        missing = "" if len(shape) > 2 else " Images need a channel dimension, as `image[None]` adds in the data set."
        raise ValueError(
            f"Expected `transform` to take and return one dictionary with {', '.join(map(repr, TARGET_KEYS))}, here "
            f"for an image of shape (C, *S) = {shape}, but it raised {type(error).__name__}: "
            f"{str(error).rstrip('.')}.{missing}"
        ) from error


def _draw_wave(size: torch.Size) -> Wave:
    # Longer waves survive more blur; shorter ones show more in small images.
    period = min(16, max(8, max(size) // 4))
    long = [length >= min(2 * period, max(size)) for length in size]  # a thin axis shows no wave
    direction = torch.randn(len(size)) * torch.tensor(long)
    axes = [length * torch.arange(pixels) for length, pixels in zip(direction / direction.norm(), size, strict=True)]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(dim=0)
    return Wave(x - x.min(), period, 2 * math.pi * float(torch.rand(())))


def _pattern(image: Tensor, wave: Wave) -> dict[str, Tensor]:
    values = wave.angle(wave.x).cos()
    low, high = (float(value) for value in image.aminmax())
    intensities = low + ((high - low) or 1.0) * (1 + values) / 2
    return {
        "image": intensities.to(image.dtype).expand_as(image).clone(),
        "pseudo_label": (values > 0).long(),
        "weight": _FIRST + (_LAST - _FIRST) * wave.x / wave.x.max().clamp(min=1),
    }


def _reports(moved: dict[str, Tensor], wave: Wave) -> list[tuple[str, float]]:
    """How far image and label lie from the weight, in pixels: 0 if near, NaN if their wave is lost."""
    weight = _centre(moved["weight"])
    inside = weight > _FIRST / 2
    x = (weight - _FIRST) / (_LAST - _FIRST) * float(wave.x.max().clamp(min=1))
    scale = max(1.0, _step(x, inside))
    reports = []
    for name, values in (
        ("image", moved["image"].float().mean(dim=0)),
        ("pseudo label", moved["pseudo_label"].float()),
    ):
        shift, spread = _displacement(_centre(values), wave.angle(x), inside, wave.period)
        near = shift <= _LARGEST_SHIFT * scale and spread <= _LARGEST_SPREAD[name] * scale
        reports.append((name, 0.0 if near else max(shift, spread)))
    return reports


def _centre(values: Tensor) -> Tensor:
    for axis, length in enumerate(values.shape):
        kept = min(length, _LARGEST_RESULT)
        values = values.narrow(axis, (length - kept) // 2, kept)
    return values


def _step(x: Tensor, inside: Tensor) -> float:
    """How far neighbouring pixels of the result lie apart in the image, in pixels."""
    steps = []
    for axis in range(x.ndim):
        both = inside.narrow(axis, 1, x.shape[axis] - 1) & inside.narrow(axis, 0, x.shape[axis] - 1)
        steps.append(x.diff(dim=axis).abs()[both].sum() / both.sum().clamp(min=1))
    return float(torch.stack(steps).norm())


def _displacement(values: Tensor, angle: Tensor, inside: Tensor, period: int) -> tuple[float, float]:
    """How far a wave in `values` (*S) lies from `angle` (*S), in pixels: the median of the cells and the spread.

    A spread that noise explains does not count. Without comparable cells both are 0; for a lost wave they are NaN.
    """
    weights, signal = _cells(inside.float(), period), _cells(values, period)
    count = weights.sum(dim=1)
    signal = signal - (weights * signal).sum(dim=1, keepdim=True) / count[:, None].clamp(min=1)
    power = (weights * signal.square()).sum(dim=1)
    basis = torch.stack([torch.ones_like(signal), _cells(angle.cos(), period), _cells(angle.sin(), period)], dim=-1)
    gram = torch.einsum("npi,np,npj->nij", basis, weights, basis)
    used = (count > _INSIDE * signal.shape[1]) & (power > _POWER * power.max())
    used &= torch.linalg.det(gram) > _DETERMINANT * count**3
    if used.sum() < _FEWEST_CELLS:
        return 0.0, 0.0
    gram, power, count = gram[used], power[used], count[used]
    moment = torch.einsum("npi,np,np->ni", basis, weights, signal)[used]
    fit = torch.linalg.solve(gram, moment)
    explained = (fit * moment).sum(dim=1)
    if explained.sum() < _CLEAR * power.sum():
        return (math.nan, math.nan) if explained.sum() < _LOST * power.sum() else (0.0, 0.0)
    _, cosine, sine = fit.unbind(dim=1)
    sign = 1.0 if cosine.sum() >= 0 else -1.0  # an inverted contrast is no displacement
    shifts = torch.atan2(sign * sine, sign * cosine)
    noise = (2 * (power - explained).clamp(min=0) / count**2 / (cosine.square() + sine.square())).sqrt()
    spread = (shifts - shifts.median()).abs().quantile(0.75) - 2 * noise.median()
    pixels = period / (2 * math.pi)
    return abs(float(shifts.median())) * pixels, float(spread) * pixels


def _cells(values: Tensor, period: int) -> Tensor:
    """(*S) cut into cells of one period along each axis, (cells, pixels); the rest at the end is dropped."""
    for axis in range(values.ndim):
        length = min(period, values.shape[2 * axis])
        values = values.narrow(2 * axis, 0, values.shape[2 * axis] // length * length)
        values = values.unflatten(2 * axis, (-1, length))
    order = [*range(0, values.ndim, 2), *range(1, values.ndim, 2)]
    cells = math.prod(values.shape[0::2])
    return values.permute(order).reshape(cells, -1)

"""Ask a network whether images are turned, inverted, scaled or out of range for it."""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from apl_lightning._support.modes import evaluating
from apl_lightning._support.resizing import resize_to
from apl_lightning.data import Keys, length_of, read_joined
from apl_lightning.heads import Inferer
from apl_lightning.preflight.network import Network
from apl_lightning.preflight.picture import Shown
from apl_lightning.preflight.report import PreflightReport, Trial
from apl_lightning.preflight.score import Score
from apl_lightning.preflight.views import AS_THEY_ARE, Kind, View, cut, next_views, views_of

# The least gain of a finding in one part of the images, by kind. Two data sets choose about the same, see
# docs/preflight.md. Ranges have more, because another contrast changes their gain by about 1 and a wrong range by 3.
MARGINS: dict[Kind, float] = {"orientation": 0.85, "inverted": 0.85, "channels": 0.85, "size": 0.8, "range": 2.0}
_LIKE = 3.0  # the likeness of features that the network knows
_DOUBT = 2.0  # how much the margin of a single patient grows per unit of likeness below it
_AGREE = 0.75  # the share of the parts that must gain
_PART = 8  # slices that vote together
_MOST = 32  # slices
_MOST_VOLUMES = 4
_ORDERS = 2  # orders of the axes of a volume that are also tried with flips
_MOST_PIXELS = 2**24  # of an enlarged image
_MOST_OF_A_VOLUME = 2**23  # voxels that an inferer runs on: each view of a whole body would take minutes
_SHOWN = 4
_LONGEST = 120  # characters of a message


def preflight(
    model: nn.Module,
    images: Any,
    *,
    num_classes: int | None = None,
    inferer: Inferer | None = None,
    main_output: int | None = None,
    max_images: int | None = None,
    image_key: str = "image",
) -> PreflightReport:
    """Ask a network whether it would rather see the images turned, flipped, inverted, resized or rescaled.

    The shift between source and target is often no shift of scanner but of orientation, spacing, range of intensities
    or order of channels. The network labels the images as they are and under views that undo such a mistake. A view is
    a finding if it suits the network clearly better in most parts of the images: the network is surer of the foreground
    it predicts, and the statistics of its features are closer to those it was trained with, if it has BatchNorm. No
    labels and no source images are needed.

    Args:
        model: A network, or a LightningModule, whose forward pass returns logits (B, C, *S) with the background at 0,
            or a nest of tuples, lists and dicts with such tensors. It is not changed.
        images: A map-style data set or a list, of tensors (C, *S), `(image, label)` or dictionaries, in 2D or 3D.
        num_classes: The number of classes, background included; by default the channels of the first logit map. A map
            with one channel is that of a binary network.
        inferer: Runs the network on images (B, C, *S), as MONAI's `SlidingWindowInferer` does. Of a volume it gets the
            centre, with at most 2^23 voxels.
        main_output: Index of the main logit map among several; if `None`, the one that depends on most parameters.
        max_images: How many images are used, spread over the data set; 32 slices or 4 volumes by default.
        image_key: The key of the image in dictionaries.

    Raises:
        TypeError: If the images have another form.
        ValueError: If there are no images, the output has no finite logits, or `main_output` is out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.preflight import preflight
        >>> network = torch.nn.Conv2d(1, 2, 1)  # sees single pixels, so turns make no difference
        >>> report = preflight(network, [torch.rand(1, 16, 16) for _ in range(4)])
        >>> report.found is None
        True
        >>> report.warn()  # nothing to warn of
    """
    tensors, cases = _sample(images, Keys(image=image_key), max_images)
    if inferer is not None:
        tensors = [centre(image, _MOST_OF_A_VOLUME) if image.ndim == 4 else image for image in tensors]
    parts = _parts(tensors)
    with evaluating(model), torch.no_grad():
        network = Network(model, num_classes, inferer, main_output, tensors[0])
        before = [network.score(AS_THEY_ARE, part) for part in parts]
        views = views_of(tensors[0][None])
        if before[0].likeness is None:
            views = [view for view in views if view.kind not in ("range", "size")]
        trials, skipped = _try(network, views, parts, before)
        if before[0].likeness is None:
            skipped.append("ranges and sizes: the network has no BatchNorm that knows those of training")
        orders = [trial for trial in trials if trial.view.moves_axes] if tensors[0].ndim == 4 else []
        for order in sorted(orders, key=lambda trial: trial.gain)[-_ORDERS:]:
            more, left_out = _try(network, next_views(order.view), parts, before)
            trials, skipped = trials + more, skipped + left_out
        found = best_of(trials, cases)
        shown = [_show(network, view, tensors) for view in (AS_THEY_ARE, *([found.view] if found else []))]
    return PreflightReport(found, trials, skipped, shown[0], shown[1] if found else [])


def best_of(trials: Sequence[Trial], cases: int) -> Trial | None:
    """The trial with the largest gain, among those with clear gains, in images of some cases."""
    clear = [trial for trial in trials if is_clear(trial.gains, MARGINS[trial.view.kind], cases, trial.likeness)]
    return max(clear, key=lambda trial: trial.gain, default=None)


def is_clear(gains: Sequence[float], margin: float, cases: int, likeness: float | None) -> bool:
    """Whether the gains in parts of the images are above a margin, and most of them above 0.

    The mean over n patients has the error of one of them divided by the square root of n, and so has the margin. More
    slices of one patient err alike. A single patient may be unlike all others: the margin is larger if, under the view
    too, the features are unlike those of training.
    """
    independent = min(len(gains), cases)
    if independent == 1 and likeness is not None:
        margin *= 1 + _DOUBT * max(0.0, _LIKE - likeness)
    return mean(gains) > margin / math.sqrt(independent) and sum(gain > 0 for gain in gains) / len(gains) >= _AGREE


def _try(
    network: Network, views: Sequence[View], parts: Sequence[Sequence[Tensor]], before: Sequence[Score]
) -> tuple[list[Trial], list[str]]:
    """A trial of each view, and why others could not be tried."""
    trials, skipped = [], []
    largest = max(image[0].numel() for part in parts for image in part)
    for view in tqdm(views, "Preflight", leave=False, disable=None):
        if largest * view.enlarges ** (parts[0][0].ndim - 1) > _MOST_PIXELS and view.enlarges > 1:
            skipped.append(f"{view.looks}: larger images than {_MOST_PIXELS} pixels")
            continue
        try:
            after = [network.score(view, part) for part in parts]
        except Exception as error:  # a network may raise anything about a size
            skipped.append(f"{view.looks}: {type(error).__name__}: {error}".splitlines()[0][:_LONGEST])
            continue
        both = list(zip(before, after, strict=True))
        surer = [late.sureness - early.sureness for early, late in both]
        known = [found for score in after if (found := _likeness(view, score)) is not None]
        gains = [gain(view, *scores) for scores in both]
        trials.append(Trial(view, gains, surer, mean(known) if known else None))
    return trials, skipped


def gain(view: View, before: Score, after: Score) -> float:
    """How much better a view suits a network.

    It is the rise of sureness and of likeness: in the later layers, if the view turns images or blurs them. Intensities
    out of range make a network sure of anything, so of ranges only likeness counts.
    """
    surer = after.sureness - before.sureness
    was, becomes = (_likeness(view, score) for score in (before, after))
    if was is None or becomes is None:
        return surer
    return becomes - was if view.kind == "range" else surer + becomes - was


def _likeness(view: View, score: Score) -> float | None:
    """The likeness that judges a view."""
    if score.likeness is None:
        return None
    return score.likeness.late if view.kind == "orientation" or view.enlarges > 1 else score.likeness.all


def _sample(images: Any, keys: Keys, most: int | None) -> tuple[list[Tensor], int]:
    """Some images (C, *S), spread over the data set, and the number of their cases; without a case, each is its own."""
    length = length_of(images)
    if most is not None and most < 1:
        raise ValueError(f"Expected `max_images` to be at least 1, but got {most}.")
    first = read_joined(images, keys, 0)["image"]
    count = min(length, most or (_MOST_VOLUMES if first.ndim == 4 else _MOST))
    indices = [(2 * place + 1) * length // (2 * count) for place in range(count)]
    samples = [read_joined(images, keys, index) for index in indices]
    cases = {sample.get("case", index) for index, sample in zip(indices, samples, strict=True)}
    return [sample["image"] for sample in samples], len(cases)


def centre(image: Tensor, most: int) -> Tensor:
    """The centre of an image (C, *S) with at most `most` pixels, its longest axes cut; a view."""
    size, left = list(image.shape[1:]), most
    for done, axis in enumerate(sorted(range(len(size)), key=size.__getitem__)):
        size[axis] = cut(size[axis], int(left ** (1 / (len(size) - done))))
        left = left // size[axis]
    for axis, kept in enumerate(size, start=1):
        image = image.narrow(axis, (image.shape[axis] - kept) // 2, kept)
    return image


def _parts(images: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Volumes one by one; slices in parts that are each spread over all of them."""
    count = len(images) if images[0].ndim == 4 else max(1, len(images) // _PART)
    return [images[part::count] for part in range(count)]


def _show(network: Network, view: View, images: Sequence[Tensor]) -> list[Shown]:
    """Some images under a view, with the predicted label maps."""
    shown = []
    for image in images[:: -(-len(images) // _SHOWN)]:
        seen = view.change(image[None])
        labels = resize_to(network.logits(view, image[None]).float(), seen).max(dim=1).indices
        shown.append(Shown(seen[0].cpu(), labels[0].cpu()))
    return shown

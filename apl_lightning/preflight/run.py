"""Ask a network whether images are turned, inverted, scaled or out of range for it."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from apl_lightning._support.modes import evaluating
from apl_lightning._support.resizing import resize_to
from apl_lightning.data import Keys
from apl_lightning.heads import Inferer
from apl_lightning.preflight.decision import best_of, gain, likeness_under
from apl_lightning.preflight.network import Network
from apl_lightning.preflight.picture import Shown
from apl_lightning.preflight.report import PreflightReport, Trial
from apl_lightning.preflight.sample import centre, parts_of, sample_of
from apl_lightning.preflight.score import Score
from apl_lightning.preflight.views import AS_THEY_ARE, View, next_views, views_of

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
    tensors, cases = sample_of(images, Keys(image=image_key), max_images)
    if inferer is not None:
        tensors = [centre(image, _MOST_OF_A_VOLUME) if image.ndim == 4 else image for image in tensors]
    parts = parts_of(tensors)
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
        known = [found for score in after if (found := likeness_under(view, score)) is not None]
        gains = [gain(view, *scores) for scores in both]
        trials.append(Trial(view, gains, surer, mean(known) if known else None))
    return trials, skipped


def _show(network: Network, view: View, images: Sequence[Tensor]) -> list[Shown]:
    """Some images under a view, with the predicted label maps."""
    shown = []
    for image in images[:: -(-len(images) // _SHOWN)]:
        seen = view.change(image[None])
        labels = resize_to(network.logits(view, image[None]).float(), seen).max(dim=1).indices
        shown.append(Shown(seen[0].cpu(), labels[0].cpu()))
    return shown

"""A network as preflight asks it: images in, scores and label maps out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning.heads import Inferer, channels_of, logit_maps, shapes_of, tensors_in, within_unit_interval
from apl_lightning.preflight.score import RunningStatistics, Score, count_foreground, sureness
from apl_lightning.preflight.views import View

_BATCH = 8


class Network:
    """Scores images under views; the arguments are those of [`preflight`][apl_lightning.preflight.preflight]."""

    def __init__(self, model: nn.Module, num_classes: int | None, inferer: Inferer | None, main_output: int) -> None:
        self._model = model
        self._num_classes = num_classes
        self._inferer = inferer
        self._main_output = main_output
        self._statistics = RunningStatistics(model)
        self._like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def score(self, view: View, images: Sequence[Tensor]) -> Score:
        """The score of images (C, *S) under a view."""
        with self._statistics.collecting():
            counts = [count_foreground(self.logits(view, batch)).cpu().double() for batch in _batches(images)]
        counted = torch.stack(counts).sum(dim=0)
        return Score(float(sureness(counted)), self._statistics.likeness())

    def logits(self, view: View, images: Tensor) -> Tensor:
        """The logits of images (B, C, *S) under a view."""
        seen = view.change(images.to(self._like.device)).to(self._like.dtype)
        output = self._model(seen) if self._inferer is None else self._inferer(seen, self._model)
        return self._main_map(output, tuple(seen.shape))

    def _main_map(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        maps = [tensor for tensor in tensors_in(output) if tensor.ndim == len(shape) and tensor.is_floating_point()]
        classes = self._num_classes or max([2, *(tensor.shape[1] for tensor in maps[:1])])
        found = logit_maps(output, channels_of(output, classes))
        if len(found) <= self._main_output:
            raise ValueError(
                f"Expected `model` to return (B, {classes}, ...) logits, but got {shapes_of(output)} for an input of "
                f"shape {shape}: pass `num_classes`, the channels of its logits, and `main_output`."
            )
        logits = found[self._main_output]
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "Expected `model` to return finite logits, but got NaN or infinity: check its weights, and the range "
                "of the images."
            )
        # Small logits may lie in [0, 1] by chance, but do not sum to 1.
        if within_unit_interval(logits) and torch.allclose(logits.sum(dim=1), logits.new_ones(()), atol=1e-2):
            raise ValueError(
                "Expected `model` to return logits, but got values in [0, 1], that sum to 1, as after a softmax: "
                "pass the network without this layer."
            )
        return logits


def _batches(images: Sequence[Tensor]) -> Iterator[Tensor]:
    """Batches of images of one shape."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        by_shape.setdefault(image.shape, []).append(image)
    for alike in by_shape.values():
        yield from torch.stack(alike).split(_BATCH if alike[0].ndim < 4 else 1)

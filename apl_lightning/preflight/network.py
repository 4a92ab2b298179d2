"""A network as preflight asks it: images in, scores and label maps out."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from apl_lightning.heads import (
    DualHeadModel,
    Inferer,
    are_probabilities,
    example_input,
    logit_maps,
    select_main_output,
    tensors_in,
)
from apl_lightning.preflight.score import RunningStatistics, Score, count_foreground, sureness
from apl_lightning.preflight.views import View

_BATCH = 8


class Network:
    """Scores images under views, by its main output, which a run on one `image` (C, *S) shows.

    The other arguments are those of [`preflight`][apl_lightning.preflight.preflight].
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int | None,
        inferer: Inferer | None,
        main_output: int | None,
        image: Tensor,
    ) -> None:
        self._model = model
        self._inferer = inferer
        self._statistics = RunningStatistics(model)
        self._like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        output = self._run(image[None])
        if main_output is None and any(isinstance(part, DualHeadModel) for part in model.modules()):
            main_output = 0
        classes = num_classes or _channels_of_first_map(output, image.ndim + 1)
        shape, example = (1, *image.shape), partial(self._example, image)
        found = select_main_output(model, output, classes, shape, main_output, example)
        self._channels, self._main_output = found.channels, found.main

    def score(self, view: View, images: Sequence[Tensor]) -> Score:
        """The score of images (C, *S) under a view."""
        with self._statistics.collecting():
            counts = [count_foreground(self.logits(view, batch)).cpu().double() for batch in _batches(images)]
        counted = torch.stack(counts).sum(dim=0)
        return Score(float(sureness(counted)), self._statistics.likeness())

    def logits(self, view: View, images: Tensor) -> Tensor:
        """The logits of images (B, C, *S) under a view."""
        output = self._run(view.change(images.to(self._like.device)))
        logits = logit_maps(output, self._channels)[self._main_output]
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "Expected `model` to return finite logits, but got NaN or infinity: check its weights, and the range "
                "of the images."
            )
        # Small logits may lie in [0, 1] by chance, but neither sum to 1 nor come close to 0 and 1.
        if are_probabilities(logits if self._channels > 1 else logits[:, 1:]):
            raise ValueError(
                "Expected `model` to return logits, but got values in [0, 1], as after a softmax or a sigmoid: pass "
                "the network without this layer."
            )
        return logits

    def _example(self, image: Tensor) -> Tensor:
        """A batch that is small enough for gradients, as a volume may not be."""
        if image.ndim == 3 and self._inferer is None:
            return image[None].to(self._like)
        try:
            return example_input(self._model)
        except ValueError:
            raise ValueError(
                "Expected `main_output`, the index of the main logit map among those that the network returns, but got "
                "none, and it accepts no images of a usual size that would show it: pass it."
            ) from None

    def _run(self, images: Tensor) -> object:
        images = images.to(self._like)
        output: object = self._model(images) if self._inferer is None else self._inferer(images, self._model)
        return output


def _channels_of_first_map(output: object, dimensions: int) -> int:
    maps = [tensor for tensor in tensors_in(output) if tensor.ndim == dimensions and tensor.is_floating_point()]
    return max([2, *(tensor.shape[1] for tensor in maps[:1])])


def _batches(images: Sequence[Tensor]) -> Iterator[Tensor]:
    """Batches of images of one shape."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        by_shape.setdefault(image.shape, []).append(image)
    for alike in by_shape.values():
        yield from torch.stack(alike).split(_BATCH if alike[0].ndim < 4 else 1)

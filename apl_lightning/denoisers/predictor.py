"""How a denoiser runs the network: plain passes, passes with dropout, features."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning._support.modes import hooked, unfixed_modules
from apl_lightning.heads import DualHeadModel, Inferer, Logits, shapes_of, sum_to_one

_ROWS = 16  # of a softmax at a time
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Predictor:
    """A network with two heads in evaluation mode, run by an inferer and in a precision context."""

    def __init__(
        self,
        module: nn.Module,
        inferer: Inferer | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._module = module
        self._inferer = inferer
        self._precision = precision
        self._dropout: list[nn.Module] | None = None
        self._has_checked = False

    def logits(self, images: Tensor) -> Logits:
        """One pass over images (B, C, *S)."""
        with self._precision():
            output = self._module(images) if self._inferer is None else self._inferer(images, self._module)
        if not isinstance(output, tuple | list) or len(output) != 2:  # a batch of two images would unpack too
            raise TypeError(
                f"Expected {type(self._module).__name__} to return the logits of two heads, but got "
                f"{shapes_of(output)}: pass it to `APLModule`, which adds the second one."
            )
        return Logits(*output)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of both heads in float32: bfloat16 rounds 0.9991 to 1."""
        main, aux = self.logits(images)
        if not self._has_checked:
            self._refuse_probabilities(main)
        softmax = _softmax if self._inferer is None else _softmax_
        main = softmax(main.float())  # one after the other, so that the logits of a volume are freed
        aux = softmax(aux.float())
        return main, aux

    def with_dropout(self, images: Tensor, rate: float) -> Logits:
        """Logits of one pass with dropout; if no dropout layer runs, on the features of both classifiers."""
        if self._dropout is None:
            self._dropout = self._running_dropout(images)
        layers = self._dropout

        def drop(features: Tensor) -> Tensor:
            return F.dropout(features, rate)

        with _training(layers) if layers else self._on_features(drop, DualHeadModel.feature_readers):
            main, aux = self.logits(images)
        return Logits(main.float(), aux.float())

    def features(self, images: Tensor) -> Tensor:
        """The input of the classifier in one plain pass, (B, F, *s); not with an inferer, which may cut images."""
        if self._inferer is not None:
            raise ValueError(
                f"Expected no `inferer` for a denoiser that reads features, but got {type(self._inferer).__name__}, "
                "whose windows have features of their own: use another denoiser, or predict whole images."
            )
        kept: list[Tensor] = []

        def keep(features: Tensor) -> Tensor:
            kept.append(features)
            return features

        with self._on_features(keep, lambda model: [model.network.get_submodule(model.head)]):
            self.logits(images)
        return kept[0]

    def _refuse_probabilities(self, logits: Tensor) -> None:
        if sum_to_one(logits):
            raise ValueError(
                f"Expected {type(self._module).__name__} to return logits, but got probabilities: leave out its "
                "softmax."
            )
        self._has_checked = True

    def _running_dropout(self, images: Tensor) -> list[nn.Module]:
        """The dropout layers that a pass uses: networks keep layers that belong to a classifier of whole images."""
        layers = [module for module in unfixed_modules(self._module) if isinstance(module, _DROPOUT) and module.p > 0]
        running: set[nn.Module] = set()
        if layers:
            with hooked(*layers, post=lambda layer, *_: running.add(layer)):
                self.logits(images[:1])
        return [layer for layer in layers if layer in running]

    def _on_features(
        self, function: Callable[[Tensor], Tensor], readers: Callable[[DualHeadModel], list[nn.Module]]
    ) -> AbstractContextManager[None]:
        """Apply a function to what some modules of the network with two heads read."""
        models = [module for module in self._module.modules() if isinstance(module, DualHeadModel)]
        if not models:
            raise TypeError(
                "Expected a module with a DualHeadModel, whose classifier shows where the features are, but "
                f"{type(self._module).__name__} has none: use `add_dual_heads`, or another denoiser."
            )
        # Of student and teacher only one runs.
        modules = [module for model in models for module in readers(model)]
        if linear := [type(module).__name__ for module in modules if isinstance(module, nn.Linear)]:
            raise ValueError(
                f"Expected classifiers that read features (B, F, *S), but got {linear[0]}, which reads (B, *S, F): use "
                "another denoiser."
            )

        def before(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if inputs:
                return (function(inputs[0]), *inputs[1:]), named
            first = next(iter(named))
            return inputs, {**named, first: function(named[first])}

        return hooked(*modules, pre=before, with_kwargs=True)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def _softmax_(logits: Tensor) -> Tensor:
    """The softmax in place, for whole images that an inferer has put together."""
    for part in logits.split(_ROWS, dim=2):
        part.copy_(part.softmax(dim=1))
    return logits


@contextmanager
def _training(layers: Sequence[nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()

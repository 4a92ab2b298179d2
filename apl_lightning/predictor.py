"""How a denoiser asks the network: one plain pass, or what else its method needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.dual import DualHeadModel, Inferer, Logits

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Predictor:
    """A network in evaluation mode, for a denoiser.

    Args:
        module: Gives the logits of both heads, (B, C, *S) each.
        inferer: Passes the images through it in its own way.
        precision: Makes the context of a pass, as autocasting.
    """

    def __init__(
        self,
        module: nn.Module,
        inferer: Inferer | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._module = module
        self._inferer = inferer
        self._precision = precision

    def logits(self, images: Tensor) -> Logits:
        """One pass over images (B, C, *S)."""
        with self._precision():
            main, aux = self._module(images) if self._inferer is None else self._inferer(images, self._module)
        return Logits(main, aux)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of both heads in float32: bfloat16 turns 0.9991 into 1."""
        main, aux = self.logits(images)
        return main.float().softmax(dim=1), aux.float().softmax(dim=1)

    def with_dropout(self, images: Tensor, rate: float) -> Logits:
        """Logits of one pass with dropout on; in a network without any, on the features of its classifier."""
        layers = [module for module in self._module.modules() if isinstance(module, _DROPOUT) and module.p > 0]
        with self._on_features(lambda features: F.dropout(features, rate)) if not layers else _training(layers):
            main, aux = self.logits(images)
        return Logits(main.float(), aux.float())

    def features(self, images: Tensor) -> Tensor:
        """What the classifier reads in one plain pass, (B, F, *s).

        Raises:
            ValueError: If an inferer stands between: it may show the network parts of an image.
        """
        if self._inferer is not None:
            raise ValueError(
                f"Expected no `inferer` for a denoiser that reads features, but got {type(self._inferer).__name__}, "
                "whose windows have features of their own: use another denoiser, or predict whole images."
            )
        kept: list[Tensor] = []
        with self._on_features(lambda features: kept.append(features) or features):  # type: ignore[func-returns-value]
            self.logits(images)
        return kept[0]

    @contextmanager
    def _on_features(self, function: Any) -> Iterator[None]:
        models = [module for module in self._module.modules() if isinstance(module, DualHeadModel)]
        if not models:
            raise TypeError(
                "Expected a module with a DualHeadModel, whose classifier tells where the features are, but "
                f"{type(self._module).__name__} has none: use `add_dual_heads`, or another denoiser."
            )

        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (function(inputs[0]), *inputs[1:])

        # Of student and teacher, the one that predicts calls its hook.
        classifiers = [model.network.get_submodule(model.head) for model in models]
        handles = [classifier.register_forward_pre_hook(hook) for classifier in classifiers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _training(layers: Sequence[nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()

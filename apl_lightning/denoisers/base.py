"""The base classes of all denoisers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from apl_lightning.denoisers.predictor import Predictor
from apl_lightning.heads import sum_to_one
from apl_lightning.losses import mean_over_heads, weighted_cross_entropy

LabelsAndWeights = tuple[Tensor, Tensor]
_ROUNDING = 0.05  # of a sum of probabilities in bfloat16


class Denoiser(ABC):
    """Turns the predictions of both heads into pseudo labels and weights, batch by batch.

    A subclass implements `__call__` and overrides the hooks that its method needs. Any other public method is an error,
    so that a misspelt hook cannot pass unnoticed.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import Denoiser, denoise
        >>> class MainHead(Denoiser):
        ...     def __call__(self, p_main, p_aux):
        ...         weights, labels = p_main.max(dim=1)
        ...         return labels, weights
        >>> p = torch.tensor([[[0.7], [0.3]]])  # one image, two classes, one pixel
        >>> denoise(MainHead(), [(p, p)])
        [(tensor([[0]]), tensor([[0.7000]]))]
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        hooks = sorted({name for base in cls.__mro__[1:] for name in dir(base) if not name.startswith("_")})
        kinds = (FunctionType, staticmethod, classmethod, property)
        for name, value in vars(cls).items():
            is_abstract = getattr(value, "__isabstractmethod__", False)
            if isinstance(value, kinds) and not (is_abstract or name.startswith("_") or name in hooks):
                raise TypeError(
                    f"Expected the public methods of {cls.__name__} to be among {hooks}, but got {name!r}: correct the "
                    "name, begin it with an underscore, or inherit from `DatasetDenoiser`."
                )

    def begin(self, round: int, num_classes: int, device: torch.device) -> None:  # noqa: B027 - optional
        """Start a round, 0 for the first one; called on all ranks."""

    def predict(self, predictor: Predictor, images: Tensor) -> tuple[Tensor, ...]:
        """Run the network on images (B, C, *S), in one plain pass by default.

        Returns the probabilities of both heads, (B, C, *S) in float32, and whatever else `__call__` or `observe` takes.
        """
        return predictor(images)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> LabelsAndWeights:
        """Denoise what `predict` returns for a batch.

        Returns labels (B, *S), int64, or soft labels (B, C, *S), and weights (B, *S) in [0, 1]; 0 ignores a pixel.
        """

    def loss(self, main: Tensor, aux: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """What training minimises on labels and weights, from the logits of both heads, (B, C, *S).

        By default the weighted cross-entropy, averaged over both heads.
        """
        return mean_over_heads(lambda logits: weighted_cross_entropy(logits, labels, weights), main, aux)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know of earlier rounds: nothing by default."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 - optional
        """Restore the state of a checkpoint."""


class DatasetDenoiser(Denoiser):
    """A denoiser that needs statistics of the whole data set before it decides.

    `observe` counts each batch, `settle` reduces the counts over ranks, and `decide` makes labels and weights.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            raise TypeError(
                f"Expected {cls.__name__} to override `observe` and `decide`, but got `__call__`, which a label pass "
                "does not use for a `DatasetDenoiser`: inherit from `Denoiser`, or override those."
            )

    @abstractmethod
    def observe(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Count what `predict` returns for a batch; returns what `decide` needs of it."""

    @abstractmethod
    def settle(self) -> None:
        """Reduce the counts over ranks; called on all of them after the last batch."""

    @abstractmethod
    def decide(self, *args: Any, **kwargs: Any) -> LabelsAndWeights:
        """Labels and weights of a batch, from what `observe` has returned for it."""

    def __call__(self, *predictions: Tensor) -> LabelsAndWeights:
        """Denoise one batch with statistics of this batch alone, after `begin`."""
        observed = self.observe(*predictions)
        self.settle()
        return self.decide(*observed)


class _FunctionDenoiser(Denoiser):
    """A plain function of the probabilities of both heads as a denoiser."""

    def __init__(self, function: Callable[..., LabelsAndWeights]) -> None:
        self._function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)  # for the log

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> LabelsAndWeights:
        return self._function(p_main, p_aux)


def as_denoiser(method: Denoiser | Callable[..., LabelsAndWeights]) -> Denoiser:
    """A denoiser, or a plain function `(p_main, p_aux) -> (labels, weights)` wrapped as one; else a `TypeError`."""
    if isinstance(method, Denoiser):
        return method
    hooks = [name for name in dir(DatasetDenoiser) if not name.startswith("_") and hasattr(method, name)]
    if not callable(method) or isinstance(method, type) or hooks:
        found = f"the class {method.__name__}" if isinstance(method, type) else f"{type(method).__name__} with {hooks}"
        raise TypeError(
            "Expected `denoiser` to be a `Denoiser` or a plain function of the probabilities of both heads, but got "
            f"{found}: pass an instance of a class that inherits from `apl_lightning.denoisers.Denoiser`."
        )
    return _FunctionDenoiser(method)


def denoise(
    denoiser: Denoiser | Callable[..., LabelsAndWeights], batches: Iterable[tuple[Tensor, ...]], round: int = 0
) -> list[LabelsAndWeights]:
    """Apply a denoiser to existing predictions, as the label pass does.

    Each batch is what `Denoiser.predict` returns: the probabilities of both heads, (B, C, *S), and whatever else the
    method needs.

    Raises:
        ValueError: If there is no batch, or if one does not begin with the probabilities of both heads.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import APL, denoise
        >>> p = torch.tensor([[[0.7], [0.3]]])
        >>> [(labels, weights)] = denoise(APL(), [(p, p)])
        >>> round(weights.item(), 4)
        0.4
    """
    batches, denoiser = list(batches), as_denoiser(denoiser)
    if not batches:
        raise ValueError("Expected at least one batch of predictions, but got none.")
    for p_main, p_aux, *_ in batches:
        _check_probabilities(p_main, p_aux)
    denoiser.begin(round, batches[0][0].shape[1], batches[0][0].device)
    if not isinstance(denoiser, DatasetDenoiser):
        return [denoiser(*batch) for batch in batches]
    observed = [denoiser.observe(*batch) for batch in batches]
    denoiser.settle()
    return [denoiser.decide(*kept) for kept in observed]


def _check_probabilities(p_main: Tensor, p_aux: Tensor) -> None:
    if p_main.shape != p_aux.shape or p_main.ndim < 3:
        raise ValueError(
            f"Expected the probabilities of both heads in one shape (B, C, *S), but got {tuple(p_main.shape)} and "
            f"{tuple(p_aux.shape)}."
        )
    for p in (p_main, p_aux):
        if p.numel() and not sum_to_one(p, _ROUNDING):
            raise ValueError(
                f"Expected probabilities that sum to 1 over the classes, but got values from {float(p.min()):g} to "
                f"{float(p.max()):g}: pass `logits.softmax(dim=1)`."
            )

"""The three kinds of second head: a module beside the classifier, the network's own output, a reader of a layer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from apl_lightning._support.resizing import resize_to
from apl_lightning.heads.gradient_hooks import FeatureTap, GradientHooks, run_constant


class Logits(NamedTuple):
    """The class scores of both heads, each (B, C, *S)."""

    main: Tensor
    aux: Tensor


class SecondHead(ABC):
    """How the auxiliary logits are made, and split from the main ones; `module` is added to the network."""

    def __init__(self, module: nn.Module | None, main_output: int, sibling: nn.Module | None = None) -> None:
        self.module = module
        self._main_output = main_output
        self._main_hooks = GradientHooks(sibling)

    def install(self, network: nn.Module, classifier: nn.Module) -> list[Any]:
        """Register the hooks on the network and its main classifier; returns their handles."""
        return self._main_hooks.install(classifier)

    def parts(self, network: nn.Module) -> list[nn.Module]:
        """The modules that make the auxiliary logits."""
        return [] if self.module is None else [self.module]

    def readers(self, network: nn.Module) -> list[nn.Module]:
        """The modules that read other features than the classifier."""
        return self.parts(network)

    def route(self, routed: bool) -> None:
        """Set whether the next forward pass separates the gradients of the two losses."""
        self._main_hooks.routed = routed

    @abstractmethod
    def split(self, maps: Sequence[Tensor], copies: int) -> list[Logits]:
        """The logits of both heads, `copies` times, from the logit maps of a forward pass."""


class CopiedHead(SecondHead):
    """A module that reads the features of the classifier; its logits pass through the rest of the network too."""

    def __init__(self, module: nn.Module, main_output: int) -> None:
        super().__init__(module, main_output, sibling=module)

    def readers(self, network: nn.Module) -> list[nn.Module]:
        """None: it reads those of the classifier."""
        return []

    def split(self, maps: Sequence[Tensor], copies: int) -> list[Logits]:
        """Main and aux alternate along the batch."""
        parts = maps[self._main_output].chunk(2 * copies)
        return [Logits(*pair) for pair in zip(parts[0::2], parts[1::2], strict=True)]


class OwnHead(SecondHead):
    """Another output of the network, with its own classifier at a dotted path."""

    def __init__(self, path: str, main_output: int, own_output: int) -> None:
        super().__init__(None, main_output)
        self._path = path
        self._own_output = own_output
        self._own_hooks = GradientHooks(None)

    def install(self, network: nn.Module, classifier: nn.Module) -> list[Any]:
        """Register hooks on both classifiers."""
        return super().install(network, classifier) + self._own_hooks.install(network.get_submodule(self._path))

    def parts(self, network: nn.Module) -> list[nn.Module]:
        """The classifier of the second output."""
        return [network.get_submodule(self._path)]

    def route(self, routed: bool) -> None:
        """Route the gradients of both classifiers, or stop to."""
        super().route(routed)
        self._own_hooks.routed = routed

    def split(self, maps: Sequence[Tensor], copies: int) -> list[Logits]:
        """Each head has a logit map of its own."""
        both = (maps[output].chunk(copies) for output in (self._main_output, self._own_output))
        return [Logits(*pair) for pair in zip(*both, strict=True)]


class TappedHead(SecondHead):
    """A module that reads the features of the layer at a path; its logits are resized to those of the main head."""

    def __init__(self, module: nn.Module, path: str, main_output: int) -> None:
        super().__init__(module, main_output)
        self._read = module
        self._path = path
        self._tap = FeatureTap()

    def install(self, network: nn.Module, classifier: nn.Module) -> list[Any]:
        """Keep the features of the layer as well."""
        tap = network.get_submodule(self._path).register_forward_hook(self._tap)
        return [*super().install(network, classifier), tap]

    def split(self, maps: Sequence[Tensor], copies: int) -> list[Logits]:
        """Run the second head on the kept features: once, or once to train it and once to train the encoder."""
        main, features = maps[self._main_output], self._tap.take()
        if copies == 1:
            logits = [self._read(features)]
        else:
            logits = [self._read(features.detach()), run_constant(self._read, (features,))]
        return [Logits(z, resize_to(aux, z)) for z, aux in zip(main.chunk(copies), logits, strict=True)]

"""A network with two heads: its logits, its two sets of parameters, and the plain network back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apl_lightning.outputs import logit_maps, tensors_in
from apl_lightning.resizing import resize_to
from apl_lightning.routing import Route, Tap, both_ways

# Predicts images (B, C, *S) with a network in its own way, as MONAI's `SlidingWindowInferer` does.
Inferer = Callable[[Tensor, Callable[[Tensor], Any]], Any]


class Logits(NamedTuple):
    """The class scores of both heads, each (B, C, *S)."""

    main: Tensor
    aux: Tensor


class DualHeadModel(nn.Module):
    """A network x -> E -> features -> D_m, D_a that returns the logits of both heads.

    Made by [`add_dual_heads`][apl_lightning.add_dual_heads]. The network inside keeps its state-dict keys: hooks on
    its classifier compute both heads on the features that pass there and join the results along the batch, and
    whatever follows in the network (an upsampling, say) carries them to the output, where they are split again.

    Attributes:
        network: The network, with hooks on its classifier.
        second: The module of the second head, or `None` where the network has its own.
        num_classes: Channels of the logits.
        head: Dotted path of the main classifier in `network`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        head: str,
        second: nn.Module | None = None,
        tap: str | None = None,
        own: str | None = None,
        outputs: tuple[int, int] = (0, 1),
        warm: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.second = second
        self.num_classes = num_classes
        self.head = head
        self._own = own
        self._outputs = outputs
        self._tap: Tap | None = None
        self._main_route = Route(second if tap is None else None)
        self._own_route = Route(None)
        self._handles = self._main_route.install(network.get_submodule(head))
        if own is not None:
            self._handles += self._own_route.install(network.get_submodule(own))
        if tap is not None:
            self._tap = Tap()
            self._handles.append(network.get_submodule(tap).register_forward_hook(self._tap))
        self._held: list[str] = []
        self.register_buffer("warm", torch.tensor(warm))
        self.warm: Tensor
        self.training = network.training
        network.training = False

    def train(self, mode: bool = True) -> DualHeadModel:
        """Set the mode of all layers; the network's own `training` flag stays off.

        Networks with deep supervision ask that flag what to return. In training too they shall answer as they do at
        test time.
        """
        super().train(mode)
        self.network.training = False
        return self

    def forward(self, image: Tensor) -> Logits:
        """Return the logits of both heads; `main` is what the plain network returns."""
        (logits,) = self._run(image, routed=False)
        return logits

    def routed(self, image: Tensor) -> tuple[Logits, Logits]:
        """Return the same logits twice: one pair trains only the heads, the other only the encoder.

        In one forward pass of the encoder, the first pair sees `features.detach()` and the second pair sees the
        features through heads whose parameters are held constant. A sum of losses on the two pairs has the gradient
        of two optimisers on the disjoint parameter sets of the paper's Algorithm 1.
        """
        for_heads, for_encoder = self._run(image, routed=True)
        return for_heads, for_encoder

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of D_m and D_a."""
        modules = [self.network.get_submodule(self.head), self.second]
        if self._own is not None:
            modules.append(self.network.get_submodule(self._own))
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """All other parameters: E."""
        heads = {id(parameter) for parameter in self.head_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in heads]

    def hold_constant(self, names: Iterable[str]) -> None:
        """Take the parameters of these names out of training until `export`."""
        for name in names:
            if (parameter := self.get_parameter(name)).requires_grad:
                parameter.requires_grad_(False)
                self._held.append(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> DualHeadModel:
        """A copy without the graph of what some networks keep from their last forward pass (MONAI's DynUNet)."""
        for module in self.modules():
            for tensor in tensors_in(vars(module)):
                if not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def export(self, average: bool = False) -> nn.Module:
        """Return a copy of the plain network: the class and the state-dict keys that came in.

        Args:
            average: Give its classifier the mean of the parameters of both heads. For heads that are one linear
                layer this is the mean of their logits.

        Raises:
            ValueError: If `average` is asked for where the heads are not two linear layers of one shape.
        """
        twin = copy.deepcopy(self)
        for handle in twin._handles:
            handle.remove()
        for name in twin._held:
            twin.get_parameter(name).requires_grad_(True)
        twin.network.training = self.training
        if average:
            main, aux = twin.network.get_submodule(self.head), twin.second
            if aux is None or self._tap is not None or list(main.children()):
                raise ValueError(
                    "Expected two heads of one linear layer each for average=True, but this network has "
                    f"{type(main).__name__} and {type(aux).__name__}: use export() without average."
                )
            with torch.no_grad():
                for ours, theirs in zip(main.parameters(), aux.parameters(), strict=True):
                    ours.lerp_(theirs, 0.5)
        return twin.network

    def _run(self, image: Tensor, routed: bool) -> list[Logits]:
        copies = 2 if routed else 1
        self._main_route.routed = self._own_route.routed = routed
        try:
            output = self.network(image)
        finally:
            self._main_route.routed = self._own_route.routed = False
        maps = logit_maps(output, self.num_classes)
        main = maps[self._outputs[0]]
        if self._own is not None:
            mains, auxes = main.chunk(copies), maps[self._outputs[1]].chunk(copies)
        elif self._tap is None:
            parts = main.chunk(2 * copies)
            mains, auxes = parts[0::2], parts[1::2]
        else:
            assert self.second is not None
            mains = main.chunk(copies)
            auxes = tuple(resize_to(aux, main) for aux in both_ways(self.second, self._tap.take(), routed))
        return [Logits(*pair) for pair in zip(mains, auxes, strict=True)]

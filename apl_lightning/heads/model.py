"""A network with two heads."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning.heads.copies import without_graphs
from apl_lightning.heads.outputs import logit_maps
from apl_lightning.heads.second_head import CopiedHead, Logits, SecondHead

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Runs a network on images (B, C, *S), as MONAI's `SlidingWindowInferer` does.
Inferer = Callable[[Tensor, Callable[[Tensor], Any]], Any]


class DualHeadModel(nn.Module):
    """A network x -> E -> features -> D_m, D_a that returns the logits of both heads.

    Made by [`add_dual_heads`][apl_lightning.add_dual_heads]. Hooks on the classifier compute both heads on its features
    and join the results along the batch. The rest of the network (an upsampling, say) carries them to the output, where
    they are split again. The network inside keeps its state-dict keys.

    Attributes:
        network: The network, with hooks on its classifier.
        second: The module of the second head; `None` if the network has its own.
        num_classes: Channels of the logits that it returns.
        channels: Channels of the network's own logits: `num_classes`, or 1 for a binary network with one logit.
        head: Dotted path of the main classifier in `network`.
        warm: Whether the second head is trained already; a cold one is warmed up before the first round.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        channels: int,
        head: str,
        second_head: SecondHead,
        dimensions: int,
        warm: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.second = second_head.module
        self.num_classes = num_classes
        self.channels = channels
        self.head = head
        self._second_head = second_head
        self._dimensions = dimensions  # of a batch (B, C, *S)
        self._handles = second_head.install(network, network.get_submodule(head))
        self._held: list[str] = []
        self._unreached: list[str] = []  # held because no logit depends on them
        self.register_buffer("warm", torch.tensor(warm))
        self.warm: Tensor
        self.training = network.training
        self._set_mode_around_head(False)

    def train(self, mode: bool = True) -> "DualHeadModel":
        """Set the mode of all layers; the `training` flags of the network and of the modules around its head stay off.

        Networks with deep supervision read that flag to decide what they return. Here they always return what they
        return at test time.
        """
        super().train(mode)
        self._set_mode_around_head(False)
        return self

    def forward(self, image: Tensor) -> Logits:
        """Return the logits of both heads; `main` equals the output of the plain network."""
        (logits,) = self._run(image, copies=1)
        return logits

    def routed(self, image: Tensor) -> tuple[Logits, Logits]:
        """Return the logits twice: one pair trains only the heads, the other one only the encoder.

        In one forward pass of the encoder, the first pair sees `features.detach()`, and the second pair sees the
        features through heads with constant parameters. A sum of losses on the two pairs has the gradient of two
        optimisers on the disjoint parameter sets of the paper's Algorithm 1.
        """
        self._second_head.route(True)
        try:
            for_heads, for_encoder = self._run(image, copies=2)
        finally:
            self._second_head.route(False)
        return for_heads, for_encoder

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of D_m and D_a."""
        modules = [self.network.get_submodule(self.head), *self._second_head.parts(self.network)]
        return [parameter for module in modules for parameter in module.parameters()]

    def feature_readers(self) -> list[nn.Module]:
        """The classifier, and the second head if it reads features of its own."""
        return [self.network.get_submodule(self.head), *self._second_head.readers(self.network)]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """All other parameters: E."""
        heads = {id(parameter) for parameter in self.head_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in heads]

    def hold_constant(self, names: Iterable[str], unreached: bool = False) -> None:
        """Exclude the parameters with these names from training; `export` includes them again.

        Those that no logit depends on are `unreached`: `release` leaves them out too.
        """
        for name in names:
            if (parameter := self.get_parameter(name)).requires_grad:
                parameter.requires_grad_(False)
                (self._unreached if unreached else self._held).append(name)

    def release(self) -> None:
        """Train again what a method has excluded."""
        while self._held:
            self.get_parameter(self._held.pop()).requires_grad_(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DualHeadModel":
        """A copy without the graphs of tensors that some networks keep from a forward pass."""
        memo.update(without_graphs(self))
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def export(self, average: bool = False) -> nn.Module:
        """Return a copy of the plain network, with the class and the state-dict keys of the network that was given.

        With `average`, its classifier gets the mean of the parameters of both heads. For heads that are one linear
        layer of torch this is the mean of their logits; for other heads it is a `ValueError`.
        """
        twin = copy.deepcopy(self)
        for handle in twin._handles:
            handle.remove()
        for name in (*twin._held, *twin._unreached):
            twin.get_parameter(name).requires_grad_(True)
        twin._set_mode_around_head(self.training)
        if average:
            main, aux = twin.network.get_submodule(self.head), twin.second
            if aux is None or not isinstance(self._second_head, CopiedHead) or not _is_linear(main):
                raise ValueError(
                    "Expected two heads of one linear layer of torch each, without weight norm, for average=True, but "
                    f"this network has {type(main).__name__} and {type(aux).__name__}: use export() without average."
                )
            with torch.no_grad():
                for ours, theirs in zip(main.parameters(), aux.parameters(), strict=True):
                    ours.lerp_(theirs, 0.5)
        return twin.network

    def _run(self, image: Tensor, copies: int) -> list[Logits]:
        if image.ndim != self._dimensions:
            raise ValueError(
                f"Expected a batch (B, C, *S) with {self._dimensions} dimensions, but got {tuple(image.shape)}: images "
                "need a channel dimension, as `image[None]` adds in the data set."
            )
        # A network in float64, or converted by the trainer's precision, may get images in float32.
        dtype = next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return self._second_head.split(logit_maps(self.network(image.to(dtype)), self.channels), copies)

    def _set_mode_around_head(self, mode: bool) -> None:
        path = self.head.split(".")
        for depth in range(len(path)):
            self.network.get_submodule(".".join(path[:depth])).training = mode


def _is_linear(head: nn.Module) -> bool:
    """Whether the mean of two heads like this one is a head with the mean of their parameters."""
    return type(head) in _LINEAR and dict(head.named_parameters()).keys() <= {"weight", "bias"}  # no weight norm

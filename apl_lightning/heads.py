"""Two classifier heads on one encoder, for any segmentation network, without touching its code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from apl_lightning.probe import HeadNotFoundError, evaluating, example_input, find_classifier, logit_maps, shapes_of

# Predicts images (B, C, *S) with a network in its own way, as MONAI's `SlidingWindowInferer` does.
Inferer = Callable[[Tensor, Callable[[Tensor], Any]], Any]

_PERTURBATION = 0.1


class Logits(NamedTuple):
    """The class scores of both heads, each (B, C, *S)."""

    main: Tensor
    aux: Tensor


class DualHeadModel(nn.Module):
    """A network x -> E -> features -> D_m, D_a that returns the logits of both heads.

    Made by [`add_dual_heads`][apl_lightning.add_dual_heads]. The network inside keeps its state-dict keys: hooks on
    its classifier compute both heads on the features that pass there and join the results along the channels, and
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
        self._tap = _Tap() if tap is not None else None
        self._main_route = _Route(second if tap is None else None)
        self._own_route = _Route(None)
        self._handles = self._main_route.install(network.get_submodule(head))
        if own is not None:
            self._handles += self._own_route.install(network.get_submodule(own))
        if self._tap is not None and tap is not None:
            self._handles.append(network.get_submodule(tap).register_forward_hook(self._tap))
        self.register_buffer("warm", torch.tensor(warm))
        self.warm: Tensor

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
        if self._own is not None:
            maps = logit_maps(output, copies * self.num_classes)
            pairs = zip(*(maps[index].chunk(copies, dim=1) for index in self._outputs), strict=True)
            return [Logits(main, aux) for main, aux in pairs]
        if self._tap is None:
            parts = logit_maps(output, 2 * copies * self.num_classes)[0].chunk(2 * copies, dim=1)
            return [Logits(main, aux) for main, aux in zip(parts[0::2], parts[1::2], strict=True)]
        mains = logit_maps(output, copies * self.num_classes)[0].chunk(copies, dim=1)
        auxes = _apply(self.second, self._tap.take(), routed)
        return [Logits(main, _resize(aux, main)) for main, aux in zip(mains, auxes, strict=True)]


def add_dual_heads(
    model: nn.Module,
    num_classes: int,
    head: str | None = None,
    aux: Literal["auto", "own", "perturbed", "fresh"] | str = "auto",
    example: Tensor | None = None,
    main_output: int = 0,
) -> DualHeadModel:
    """Give a copy of any pretrained segmentation network a second classifier on its shared encoder.

    The default second head is the network's own second output where it returns two, and else a perturbed copy of
    the classifier: it starts as good as the first, so that the very first pseudo labels can be merged from both,
    and the perturbation keeps the two from being one (an exact copy gets the same gradient for ever).

    Args:
        model: A network that returns logits: (B, num_classes, *S), or a tuple, list or dict with such tensors. It
            is copied, not changed.
        num_classes: Channels of the logits, background included.
        head: Dotted path of the classifier; found automatically if `None`.
        aux: The second head. `"perturbed"`: a copy of the classifier with noise of 10 % of the size of each
            parameter. `"fresh"`: a re-initialised copy, warmed up on the predictions of the first one (features
            frozen) before the first round. `"own"`: the network's second output. Any other value is the dotted
            path of a layer: a fresh 1 x 1 classifier reads its features, and is warmed up likewise. `"auto"`:
            `"own"` if the network returns two logit maps, else `"perturbed"`.
        example: A batch that the network accepts; made from its first convolution if `None`.
        main_output: Which of several outputs is the main one.

    Returns:
        The network with two heads, in the mode (train or eval) of `model`.

    Raises:
        HeadNotFoundError: If no single module explains the output.
        ValueError: If the network returns another number of channels, ends in a softmax or a sigmoid, or lacks a
            module that was named.

    Example:
        >>> import torch
        >>> from apl_lightning import add_dual_heads
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1)).eval()
        >>> model = add_dual_heads(network, num_classes=5)
        >>> model.head
        '1'
        >>> image = torch.rand(2, 1, 16, 16)
        >>> main, aux = model(image)
        >>> torch.equal(main, network(image)), torch.equal(main, aux)
        (True, False)
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"Expected `num_classes` to be an integer of at least 2, but got {num_classes!r}.")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "Expected `model` to be a plain network, but got a compiled one: pass the network itself and compile what "
            "comes out, as in `torch.compile(APLModule(network, ...))`."
        )
    network = copy.deepcopy(model)
    example = example_input(network) if example is None else example
    with evaluating(network), torch.no_grad():
        output = network(example)
    plain = logit_maps(output, num_classes)
    if not plain:
        raise ValueError(_wrong_classes(output, num_classes, tuple(example.shape)))
    if aux == "auto":
        aux = "own" if len(plain) == 2 else "perturbed"
    if not 0 <= main_output < len(plain):
        raise ValueError(f"Expected `main_output` below {len(plain)}, the number of outputs, but got {main_output}.")

    path = _classifier(network, num_classes, head, example, main_output)
    classifier = network.get_submodule(path)
    if aux == "own":
        if len(plain) != 2:
            raise ValueError(
                f"Expected two outputs with {num_classes} channels for aux='own', but {type(model).__name__} returns "
                f"{shapes_of(output)}: use aux='perturbed' or aux='fresh'."
            )
        own = find_classifier(network, num_classes, example, 1 - main_output)
        dual = DualHeadModel(network, num_classes, path, own=own, outputs=(main_output, 1 - main_output))
    elif aux == "perturbed":
        dual = DualHeadModel(network, num_classes, path, second=_perturbed(classifier))
    elif aux == "fresh":
        dual = DualHeadModel(network, num_classes, path, second=_reinitialised(classifier), warm=False)
    else:
        second = _reader(network, num_classes, aux, example)
        dual = DualHeadModel(network, num_classes, path, second=second, tap=aux, warm=False)
    dual.train(model.training)
    _check_heads(dual, example, plain[main_output])
    return dual


class _Route:
    """Hooks on a classifier that compute its sibling too and decide where gradients go.

    An object rather than a closure, so that deepcopy and pickle carry it along.
    """

    def __init__(self, sibling: nn.Module | None) -> None:
        self.sibling = sibling
        self.routed = False
        self._features: Tensor | None = None
        self._inside = False

    def install(self, classifier: nn.Module) -> list[Any]:
        return [classifier.register_forward_pre_hook(self.before), classifier.register_forward_hook(self.after)]

    def before(self, _classifier: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.routed or self._inside:
            return None
        self._features = inputs[0]
        return (inputs[0].detach(), *inputs[1:])

    def after(self, classifier: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._inside:
            return output
        logits = [output]
        if self.sibling is not None:
            logits.append(self.sibling(*inputs))
        if self.routed:
            arguments = (self._features, *inputs[1:])
            self._features = None
            self._inside = True
            try:
                logits += [_frozen(head, arguments) for head in (classifier, self.sibling) if head is not None]
            finally:
                self._inside = False
        return torch.cat(logits, dim=1) if len(logits) > 1 else output


class _Tap:
    """A hook that keeps the features of a layer until the second head reads them."""

    def __init__(self) -> None:
        self.features: Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        self.features = output

    def take(self) -> Tensor:
        features, self.features = self.features, None
        assert features is not None, "the tapped layer was called when the heads were added"
        return features


def _frozen(head: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    """The head as a constant function: gradients pass through it, none stays in it, and its buffers do not move."""
    state = {name: parameter.detach() for name, parameter in head.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in head.named_buffers()}
    logits: Tensor = functional_call(head, state, arguments)
    return logits


def _apply(head: nn.Module | None, features: Tensor, routed: bool) -> list[Tensor]:
    assert head is not None
    return [head(features.detach()), _frozen(head, (features,))] if routed else [head(features)]


def _resize(logits: Tensor, reference: Tensor) -> Tensor:
    if logits.shape[2:] == reference.shape[2:]:
        return logits
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[logits.ndim]
    return F.interpolate(logits, size=reference.shape[2:], mode=mode, align_corners=False)


def _perturbed(head: nn.Module) -> nn.Module:
    """A copy of the head with Gaussian noise of a tenth of the root mean square of each parameter."""
    twin = copy.deepcopy(head)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.square().mean().sqrt() * _PERTURBATION)
    return twin


def _reinitialised(head: nn.Module) -> nn.Module:
    twin = copy.deepcopy(head)
    for module in twin.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return twin


def _reader(network: nn.Module, num_classes: int, path: str, example: Tensor) -> nn.Module:
    """A fresh 1 x 1 classifier for the features of the layer at `path`."""
    layer, tap = _submodule(network, path, "aux"), _Tap()
    handle = layer.register_forward_hook(tap)
    try:
        with evaluating(network), torch.no_grad():
            network(example)
    finally:
        handle.remove()
    features = tap.features
    if not isinstance(features, Tensor) or features.ndim != example.ndim:
        raise ValueError(
            f"Expected the layer {path!r} to return features of shape (B, C, *S), but got {shapes_of(features)}: name "
            "another layer in `aux`."
        )
    convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[features.ndim]
    return convolution(features.shape[1], num_classes, 1).to(device=features.device, dtype=features.dtype)


def _classifier(network: nn.Module, num_classes: int, head: str | None, example: Tensor, output: int) -> str:
    if head is None:
        return find_classifier(network, num_classes, example, output)
    _submodule(network, head, "head")
    return head


def _submodule(network: nn.Module, path: str, argument: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        names = [name for name, module in network.named_modules() if name and not list(module.children())]
        raise ValueError(
            f"Expected `{argument}` to be the dotted path of a module of {type(network).__name__}, but got {path!r}: "
            f"its last modules are {', '.join(names[-5:])}."
        ) from None


def _wrong_classes(output: object, num_classes: int, shape: tuple[int, ...]) -> str:
    single = isinstance(output, Tensor) and output.ndim == len(shape)
    cure = f"pass num_classes={output.shape[1]}" if single and isinstance(output, Tensor) else "see `num_classes`"
    return (
        f"Expected `model` to return (B, {num_classes}, ...) logits, but got {shapes_of(output)} for an input of shape "
        f"{shape}: {cure}."
    )


def _check_heads(model: DualHeadModel, example: Tensor, plain: Tensor) -> None:
    """Prove on the example that the main head still gives the network's output, and that it gives logits."""
    try:
        with evaluating(model), torch.no_grad():
            main, aux = model(example)
            same = main.shape == plain.shape and torch.allclose(main, plain, rtol=1e-4, atol=1e-5)
            cause = "" if same else "the logits changed"
            same = same and aux.shape == plain.shape
    except Exception as error:  # the network's own code, run with more channels than it was written for
        same, cause = False, f"{type(error).__name__}: {error}"
    if not same:
        raise HeadNotFoundError(
            f"Expected nothing behind the classifier {model.head!r} to mix channels, but with a second head on it "
            f"{cause or 'the second output had another shape'}: remove a softmax from the network (activation=None), "
            "or pass the `head` that makes the final logits."
        )
    if plain.min() >= 0 and plain.max() <= 1 and not _linear_behind_head(model, example, plain):
        raise ValueError(
            "Expected `model` to return logits, but all its outputs lie in [0, 1] behind a sigmoid or a softmax: "
            "remove it (activation=None)."
        )


def _linear_behind_head(model: DualHeadModel, example: Tensor, plain: Tensor) -> bool:
    handle = model.network.get_submodule(model.head).register_forward_hook(lambda _module, _inputs, result: 2 * result)
    try:
        with evaluating(model), torch.no_grad():
            return torch.allclose(model(example).main, 2 * plain, rtol=1e-3, atol=1e-5)
    finally:
        handle.remove()

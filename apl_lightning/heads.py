"""Give any segmentation network a second classifier, without touching its code."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from apl_lightning.dual import DualHeadModel
from apl_lightning.probe import HeadNotFoundError, evaluating, example_input, find_classifier, logit_maps, shapes_of
from apl_lightning.routing import Tap

_PERTURBATION = 0.1


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

    Examples:
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
    outputs = (main_output, 1 - main_output)
    if aux == "own":
        if len(plain) != 2:
            raise ValueError(
                f"Expected two outputs with {num_classes} channels for aux='own', but {type(model).__name__} returns "
                f"{shapes_of(output)}: use aux='perturbed' or aux='fresh'."
            )
        own = find_classifier(network, num_classes, example, 1 - main_output)
        dual = DualHeadModel(network, num_classes, path, own=own, outputs=outputs)
    elif aux == "perturbed":
        dual = DualHeadModel(network, num_classes, path, second=_perturbed(classifier), outputs=outputs)
    elif aux == "fresh":
        dual = DualHeadModel(network, num_classes, path, second=_reinitialised(classifier), outputs=outputs, warm=False)
    else:
        second = _reader(network, num_classes, aux, example)
        dual = DualHeadModel(network, num_classes, path, second=second, tap=aux, outputs=outputs, warm=False)
    dual.train(model.training)
    _check_heads(dual, example, plain[main_output])
    return dual


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
    layer, tap = _submodule(network, path, "aux"), Tap()
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
        words = "'auto', 'own', 'perturbed', 'fresh' or " if argument == "aux" else ""
        raise ValueError(
            f"Expected `{argument}` to be {words}the dotted path of a module of {type(network).__name__}, but got "
            f"{path!r}: its last modules are {', '.join(names[-5:])}."
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
    except Exception as error:  # the network's own code, run behind its classifier with a larger batch
        same, cause = False, f"{type(error).__name__}: {error}"
    if not same:
        raise HeadNotFoundError(
            f"Expected the network to treat each image by itself behind its classifier {model.head!r}, but with both "
            f"heads joined along the batch {cause or 'the second output had another shape'}: pass the `head` that "
            "makes the final logits."
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

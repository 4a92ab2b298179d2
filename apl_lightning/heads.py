"""Give any segmentation network a second classifier, without touching its code."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from apl_lightning.dual import DualHeadModel
from apl_lightning.outputs import explain_wrong_classes, logit_maps, shapes_of
from apl_lightning.probe import evaluating, example_input, find_classifier, find_main_output
from apl_lightning.proof import prove_heads
from apl_lightning.second_head import perturbed, reader, reinitialised
from apl_lightning.source import plain_network


def add_dual_heads(
    model: nn.Module,
    num_classes: int,
    head: str | None = None,
    aux: Literal["auto", "own", "perturbed", "fresh"] | str = "auto",
    example: Tensor | None = None,
    main_output: int | None = None,
    network: str | None = None,
) -> DualHeadModel:
    """Give a copy of any pretrained segmentation network a second classifier on its shared encoder.

    The default second head is the network's own second output where it returns two, and else a perturbed copy of
    the classifier: it starts as good as the first, so that the very first pseudo labels can be merged from both,
    and the perturbation keeps the two from being one (an exact copy gets the same gradient for ever).

    Args:
        model: A network that returns logits: (B, num_classes, *S), or a tuple, list or dict with such tensors; or a
            LightningModule that holds one. It is copied, not changed.
        num_classes: Channels of the logits, background included.
        head: Dotted path of the classifier; found automatically if `None`.
        aux: The second head. `"perturbed"`: a copy of the classifier with noise of 10 % of the size of each
            parameter. `"fresh"`: a re-initialised copy, warmed up on the predictions of the first one (features
            frozen) before the first round. `"own"`: the network's second output. Any other value is the dotted
            path of a layer: a fresh 1 x 1 classifier reads its features, and is warmed up likewise. `"auto"`:
            `"own"` if the network returns two logit maps, else `"perturbed"`.
        example: A batch that the network accepts; made from its first convolution if `None`.
        main_output: Which of several outputs is the main one; if `None`, the one that most parameters act on.
        network: Dotted path of the network in a LightningModule; found automatically if `None`.

    Returns:
        The network with two heads, in the mode (train or eval) of `model`.

    Raises:
        HeadNotFoundError: If no single module explains the output.
        TypeError: If `model` is compiled already.
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
    source = plain_network(model, num_classes, network)
    # A LightningModule that is a network itself may still hold its trainer. What is tried out is tried on a copy of
    # its own: some networks keep things from a forward pass (Hugging Face hooks that no longer pickle).
    twin = copy.deepcopy(source, {id(getattr(source, "_trainer", None)): None})
    trial = copy.deepcopy(twin)
    example = example_input(trial) if example is None else example
    with evaluating(trial), torch.no_grad():
        output = trial(example)
    plain = logit_maps(output, num_classes)
    if not plain:
        raise ValueError(explain_wrong_classes(output, num_classes, tuple(example.shape)))
    if main_output is None:
        main_output = find_main_output(trial, num_classes, example) if len(plain) > 1 else 0
    if not 0 <= main_output < len(plain):
        raise ValueError(f"Expected `main_output` below {len(plain)}, the number of outputs, but got {main_output}.")

    path = _classifier(trial, num_classes, head, example, main_output)
    classifier, outputs = twin.get_submodule(path), (main_output, 1 - main_output)
    if aux == "own" or (aux == "auto" and len(plain) == 2):
        if len(plain) != 2:
            raise ValueError(
                f"Expected two outputs with {num_classes} channels for aux='own', but {type(source).__name__} returns "
                f"{shapes_of(output)}: use aux='perturbed' or aux='fresh'."
            )
        own = find_classifier(trial, num_classes, example, 1 - main_output)
        dual = DualHeadModel(twin, num_classes, path, own=own, outputs=outputs)
    elif aux in ("auto", "perturbed"):
        dual = DualHeadModel(twin, num_classes, path, second=perturbed(classifier), outputs=outputs)
    elif aux == "fresh":
        dual = DualHeadModel(twin, num_classes, path, second=reinitialised(classifier), outputs=outputs, warm=False)
    else:
        _check_path(twin, aux, "aux")
        second = reader(trial, num_classes, aux, example)
        dual = DualHeadModel(twin, num_classes, path, second=second, tap=aux, outputs=outputs, warm=False)
    dual.hold_constant(prove_heads(copy.deepcopy(dual), example, plain[main_output]))
    return dual


def _classifier(network: nn.Module, num_classes: int, head: str | None, example: Tensor, output: int) -> str:
    if head is None:
        return find_classifier(network, num_classes, example, output)
    _check_path(network, head, "head")
    return head


def _check_path(network: nn.Module, path: str, argument: str) -> None:
    try:
        network.get_submodule(path)
    except AttributeError:
        names = [name for name, module in network.named_modules() if name and not list(module.children())]
        words = "'auto', 'own', 'perturbed', 'fresh' or " if argument == "aux" else ""
        raise ValueError(
            f"Expected `{argument}` to be {words}the dotted path of a module of {type(network).__name__}, but got "
            f"{path!r}: its last modules are {', '.join(names[-5:])}."
        ) from None

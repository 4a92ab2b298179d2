"""Add a second classifier to any segmentation network, without changes to its code."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from apl_lightning._support.lightning import copy_without_trainer
from apl_lightning._support.modes import evaluating
from apl_lightning.heads.find_classifier import example_input, find_classifier, find_main_output
from apl_lightning.heads.model import DualHeadModel
from apl_lightning.heads.new_head import perturbed, reader, reinitialised
from apl_lightning.heads.outputs import explain_wrong_classes, logit_maps, shapes_of
from apl_lightning.heads.second_head import CopiedHead, OwnHead, SecondHead, TappedHead
from apl_lightning.heads.unwrap import plain_network
from apl_lightning.heads.verify import verify_heads


def add_dual_heads(
    model: nn.Module,
    num_classes: int,
    head: str | None = None,
    aux: Literal["auto", "own", "perturbed", "fresh"] | str = "auto",
    example: Tensor | None = None,
    main_output: int | None = None,
    network: str | None = None,
) -> DualHeadModel:
    """Add a second classifier to a copy of a pretrained segmentation network, on its shared encoder.

    By default the second head is the network's own second output, if it returns two, and otherwise a perturbed copy of
    the classifier. The copy is as good as the first head from the start, so that the first pseudo labels can be merged
    from both. The perturbation keeps the two apart: an exact copy always gets the same gradient.

    Args:
        model: A network that returns logits: (B, num_classes, *S), or a tuple, list or dict with such tensors; or a
            LightningModule that contains one. It is copied, not changed.
        num_classes: Channels of the logits, background included.
        head: Dotted path of the classifier; found automatically if `None`.
        aux: The second head. `"perturbed"`: a copy of the classifier with noise of 10 % of the size of each
            parameter. `"fresh"`: a re-initialised copy, warmed up on the predictions of the first head (with fixed
            features) before the first round. `"own"`: the network's second output. Any other value is the dotted
            path of a layer, whose features a new 1 x 1 classifier reads, warmed up likewise. `"auto"`:
            `"own"` if the network returns two logit maps, else `"perturbed"`.
        example: A batch that the network accepts; made from its first convolution if `None`.
        main_output: Index of the main output among several; if `None`, the one that depends on most parameters.
        network: Dotted path of the network in a LightningModule; found automatically if `None`.

    Returns:
        The network with two heads, in the mode (train or eval) of `model`.

    Raises:
        HeadNotFoundError: If no single module explains the output.
        TypeError: If `model` is compiled already.
        ValueError: If the network returns another number of channels, ends in a softmax or a sigmoid, or has no module
            of a given name.

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
    twin = copy_without_trainer(plain_network(model, num_classes, network))
    # Some networks keep things from a forward pass (Hugging Face: hooks that cannot be pickled), so trials run on a
    # copy of their own.
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
    if head is None:
        head = find_classifier(trial, num_classes, example, main_output)
    _check_path(twin, head, "head")
    if aux == "auto":
        aux = "own" if len(plain) == 2 else "perturbed"
    if aux == "own" and len(plain) != 2:
        raise ValueError(
            f"Expected two outputs with {num_classes} channels for aux='own', but {type(twin).__name__} returns "
            f"{shapes_of(output)}: use aux='perturbed' or aux='fresh'."
        )
    second_head = _second_head(aux, twin.get_submodule(head), trial, num_classes, example, main_output)
    dual = DualHeadModel(twin, num_classes, head, second_head, warm=aux in ("own", "perturbed"))
    dual.hold_constant(verify_heads(copy.deepcopy(dual), example, plain[main_output]))
    return dual


def _second_head(
    aux: str, classifier: nn.Module, trial: nn.Module, num_classes: int, example: Tensor, main_output: int
) -> SecondHead:
    if aux == "own":
        return OwnHead(find_classifier(trial, num_classes, example, 1 - main_output), main_output)
    if aux == "perturbed":
        return CopiedHead(perturbed(classifier), main_output)
    if aux == "fresh":
        return CopiedHead(reinitialised(classifier), main_output)
    _check_path(trial, aux, "aux")
    return TappedHead(reader(trial, num_classes, aux, example), aux, main_output)


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

"""Add a second classifier to any segmentation network, without changes to its code."""

import copy
import operator
from contextlib import suppress
from typing import Literal, SupportsIndex

from torch import Tensor, nn

from apl_lightning.heads.copies import clean_copy
from apl_lightning.heads.find_classifier import find_classifier
from apl_lightning.heads.model import DualHeadModel
from apl_lightning.heads.new_head import perturbed, reader, reinitialised
from apl_lightning.heads.second_head import CopiedHead, OwnHead, SecondHead, TappedHead
from apl_lightning.heads.trial import Trial, run_trial
from apl_lightning.heads.unwrap import plain_network
from apl_lightning.heads.verify import verify_fresh_head, verify_heads


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
            LightningModule that contains one. Its weights are float32 or float64. It is copied, not changed.
        num_classes: The number of classes, background included. With 2, a network that returns one logit z is served
            too: its logits are (0, z), whose softmax is the sigmoid of z.
        head: Dotted path of the classifier; found automatically if `None`.
        aux: The second head. `"perturbed"`: a copy of the classifier with noise of 10 % of the size of each
            parameter. `"fresh"`: a re-initialised copy, warmed up on the predictions of the first head (with fixed
            features) before the first round. `"own"`: the network's second output. Any other value is the dotted
            path of a layer, whose features a new 1 x 1 classifier reads, warmed up likewise. `"auto"`:
            `"own"` if the network returns two logit maps of one shape with a classifier each, else `"perturbed"`; for
            a network with one logit always `"perturbed"`, since a second map may be another label.
        example: A batch that the network accepts; made from its first convolution if `None`.
        main_output: Index of the main output among several; if `None`, the one that depends on most parameters. Must
            be given if a network returns several maps with one logit.
        network: Dotted path of the network in a LightningModule; found automatically if `None`.

    Returns:
        The network with two heads, in the mode (train or eval) of `model`.

    Raises:
        HeadNotFoundError: If no single module explains the output.
        TypeError: If `model` has two heads or is compiled already, or is TorchScript.
        ValueError: If the network returns another number of channels, NaN or other logits in each pass, ends in a
            softmax or a sigmoid, has weights in half precision, none before its classifier to refine, or no module of a
            given name.

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
    num_classes = _checked(num_classes)
    given = plain_network(model, num_classes, network)
    _refuse_half(given)
    if head is not None:
        _check_path(given, head, "head")
    # Some networks keep things from a forward pass (Hugging Face: hooks that cannot be pickled), so trials run on a
    # copy of their own.
    trial = run_trial(clean_copy(given), num_classes, example, main_output, head)

    def with_second(aux: str) -> DualHeadModel:
        twin = clean_copy(given)
        second_head = _second_head(aux, twin.get_submodule(trial.head), trial, num_classes)
        warm = aux in ("own", "perturbed")
        dual = DualHeadModel(twin, num_classes, trial.channels, trial.head, second_head, trial.example.ndim, warm)
        dual.hold_constant(verify_heads(copy.deepcopy(dual), trial.example, trial.plain), unreached=True)
        if aux == "fresh":
            verify_fresh_head(copy.deepcopy(dual), trial.example)
        return dual

    if aux != "auto":
        return with_second(aux)
    # A second map with one channel is seldom a second opinion: it may be an edge or another label.
    if trial.channels > 1 and len(trial.maps) > 1:
        with suppress(ValueError):
            return with_second("own")
    return with_second("perturbed")


def _second_head(aux: str, classifier: nn.Module, trial: Trial, num_classes: int) -> SecondHead:
    if aux == "own":
        return _own_head(trial)
    if aux == "perturbed":
        return CopiedHead(perturbed(classifier), trial.main_output)
    if aux == "fresh":
        return CopiedHead(reinitialised(classifier), trial.main_output)
    _check_path(trial.network, aux, "aux")
    return TappedHead(reader(trial.network, num_classes, aux, trial.example), aux, trial.main_output)


def _own_head(trial: Trial) -> OwnHead:
    others, cure = trial.others(), "use aux='perturbed' or aux='fresh'"
    if len(others) != 1:
        raise ValueError(
            f"Expected two outputs with {trial.channels} channels and a classifier each for aux='own', but "
            f"{type(trial.network).__name__} returns {trial.shapes}: {cure}."
        )
    shapes = [tuple(trial.maps[output].shape) for output in (trial.main_output, *others)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Expected two outputs of one shape for aux='own', but got {shapes[0]} and {shapes[1]}: {cure}."
        )
    path = find_classifier(trial.network, trial.channels, trial.example, others[0])
    return OwnHead(path, trial.main_output, others[0])


def _checked(num_classes: SupportsIndex) -> int:
    try:
        number = operator.index(num_classes)
    except TypeError:
        number = 0
    if isinstance(num_classes, bool) or number < 2:
        binary = ": pass num_classes=2, background and foreground; a network with one logit is served"
        cure = binary if number == 1 else ""
        raise ValueError(f"Expected `num_classes` to be an integer of at least 2, but got {num_classes!r}{cure}.")
    return number


def _refuse_half(network: nn.Module) -> None:
    half = [p.dtype for p in network.parameters() if p.is_floating_point() and p.element_size() < 4]
    if half:
        raise ValueError(
            f"Expected `model` to have float32 or float64 weights, but got {half[0]}, which rounds small steps away: "
            "call `model.float()`; for speed, pass precision='bf16-mixed' to the Trainer."
        )


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

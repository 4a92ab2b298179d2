"""Verify on an example that two heads compute what they should, before anything is trained."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating, hooked, trainable
from apl_lightning.heads.find_classifier import HeadNotFoundError
from apl_lightning.heads.gradients import gradients_of
from apl_lightning.heads.model import DualHeadModel
from apl_lightning.heads.outputs import are_probabilities, within_unit_interval


def verify_heads(model: DualHeadModel, example: Tensor, plain: Tensor) -> list[str]:
    """Check that the main head gives `plain`, the network's own logits, and that gradients go where they belong.

    Returns:
        The names of the parameters that no loss reaches: AdaptSegNet's last two dilations, heads of deep supervision.
        DDP would wait for their gradients for ever.

    Raises:
        HeadNotFoundError: If the heads cannot be computed side by side in this network.
        ValueError: If the network is random, ends in a softmax or a sigmoid, or has no parameter to refine.
    """
    try:
        with evaluating(model), torch.no_grad():
            first, again, *routed = model(example), model(example), *model.routed(example)
    except Exception as error:  # the network's own code behind its classifier, on a larger batch
        raise _inseparable(model, f"{type(error).__name__}: {error}") from error
    if not (_close(again.main, first.main) and _close(again.aux, first.aux)):
        raise ValueError(
            "Expected `model` to return the same logits for the same images in evaluation mode, but two passes differ: "
            "switch off its noise (dropout with `training=self.training`)."
        )
    if not all(_close(main, plain) and _close(aux, first.aux) for main, aux in (first, *routed)):
        raise _inseparable(model, "the logits changed")
    if within_unit_interval(plain) and not (
        _linear_behind_head(model, example, plain) and _unbounded(model, example, plain)
    ):
        raise ValueError(
            "Expected `model` to return logits, but all its outputs lie in [0, 1] behind a sigmoid or a softmax: "
            "remove it (activation=None)."
        )
    if model.num_classes == plain.shape[1] and are_probabilities(first.aux) and not are_probabilities(plain):
        raise ValueError(
            "Expected logits of both heads, but the second one gives values in [0, 1], as after a softmax or a sigmoid:"
            " use aux='perturbed', or return its logits."
        )
    return _verify_routing(model, example)


def verify_fresh_head(model: DualHeadModel, example: Tensor) -> None:
    """Raise a `ValueError` if a head with new weights gives the logits of the main one, up to its bias."""
    with evaluating(model), torch.no_grad():
        main, aux = model(example)
    difference = (aux - main).movedim(1, 0).flatten(1)
    if bool((difference - difference.mean(dim=1, keepdim=True)).abs().max() <= 1e-4 * main.abs().max()):
        raise ValueError(
            f"Expected aux='fresh' to draw new weights of the classifier {model.head!r}, but it computes the same: it "
            "has weight or spectral norm, or no `reset_parameters`. Use aux='perturbed'."
        )


def _close(logits: Tensor, expected: Tensor) -> bool:
    """Equality up to rounding, relative to the largest logit."""
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= 1e-3 * expected.abs().max())


def _inseparable(model: DualHeadModel, cause: str) -> HeadNotFoundError:
    return HeadNotFoundError(
        f"Expected the network to treat each image by itself behind its classifier {model.head!r}, but with both heads "
        f"joined along the batch {cause}: pass the `head` that makes the final logits, and as `aux` a layer before it; "
        "remove hooks of your own on it."
    )


def _linear_behind_head(model: DualHeadModel, example: Tensor, plain: Tensor) -> bool:
    doubled = hooked(model.network.get_submodule(model.head), post=lambda _module, _inputs, result: 2 * result)
    with doubled, evaluating(model), torch.no_grad():
        return _close(model(example).main, 2 * plain)


def _unbounded(model: DualHeadModel, example: Tensor, plain: Tensor) -> bool:
    """Whether the head gives larger values for larger features; so does one that normalises them, as far as we know."""

    def enlarge(_module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(1e6 * each if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)

    enlarged = hooked(model.network.get_submodule(model.head), pre=enlarge)
    with enlarged, evaluating(model), torch.no_grad():
        main = model(example).main
    return not within_unit_interval(main) or _close(main, plain)


def _verify_routing(model: DualHeadModel, example: Tensor) -> list[str]:
    if not model.encoder_parameters():
        raise ValueError(
            f"Expected `model` to have weights before its classifier {model.head!r}, which are refined, but it has "
            "none: pass another `head`, or a larger network."
        )
    if not any(parameter.requires_grad for parameter in model.encoder_parameters()):
        raise ValueError(
            "Expected `model` to have an encoder to refine, but all its parameters are frozen: call "
            "`model.requires_grad_(True)`."
        )
    with trainable(model), evaluating(model):
        for_heads, for_encoder = model.routed(example)
        encoder = [parameter for parameter in model.encoder_parameters() if parameter.requires_grad]
        leak = _gradients(for_heads, encoder)
        reached = _gradients(for_encoder, encoder)
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        behind = _gradients(for_encoder, [p for p in model.head_parameters() if p.requires_grad])
        everything = _gradients((*for_heads, *for_encoder), parameters)
    if not any(p.requires_grad and gradient is not None for p, gradient in zip(encoder, reached, strict=True)):
        raise ValueError(
            f"Expected a loss of the logits to train the layers before the classifier {model.head!r}, but no gradient "
            "reaches one that `requires_grad`: remove `torch.no_grad()` and `detach()` from the network's code, or "
            "call `model.requires_grad_(True)`."
        )
    if any(gradient is not None and bool(gradient.any()) for gradient in leak):
        raise HeadNotFoundError(
            f"Expected the classifier {model.head!r} to see its features only through its arguments, but a gradient of "
            "the heads reached the encoder: pass the `head` whose forward takes the features as tensors."
        )
    if any(gradient is not None and bool(gradient.any()) for gradient in behind):
        raise HeadNotFoundError(
            f"Expected the classifier {model.head!r} to have weights of its own, but layers before it use them too, so "
            "L_SSL would train it: give each a copy."
        )
    return [name for name, gradient in zip(names, everything, strict=True) if gradient is None]


def _gradients(logits: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return gradients_of(torch.stack([z.square().sum() for z in logits]).sum(), parameters)

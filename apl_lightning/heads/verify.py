"""Verify on an example that two heads compute what they should, before anything is trained."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating, hooked, trainable
from apl_lightning.heads.find_classifier import HeadNotFoundError
from apl_lightning.heads.model import DualHeadModel


def verify_heads(model: DualHeadModel, example: Tensor, plain: Tensor) -> list[str]:
    """Check that the main head gives `plain`, the network's own logits, and that gradients go where they belong.

    Returns:
        The names of the parameters that no loss reaches: AdaptSegNet's last two dilations, heads of deep supervision.
        DDP would wait for their gradients for ever.

    Raises:
        HeadNotFoundError: If the heads cannot be computed side by side in this network.
        ValueError: If the network ends in a softmax or a sigmoid, or has no trainable parameter.
    """
    try:
        with evaluating(model), torch.no_grad():
            main, aux = model(example)
            same = main.shape == plain.shape and torch.allclose(main, plain, rtol=1e-4, atol=1e-5)
            cause = "" if same else "the logits changed"
            same = same and aux.shape == plain.shape
    except Exception as error:  # the network's own code behind its classifier, on a larger batch
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
    return _verify_routing(model, example)


def _linear_behind_head(model: DualHeadModel, example: Tensor, plain: Tensor) -> bool:
    doubled = hooked(model.network.get_submodule(model.head), post=lambda _module, _inputs, result: 2 * result)
    with doubled, evaluating(model), torch.no_grad():
        return torch.allclose(model(example).main, 2 * plain, rtol=1e-3, atol=1e-5)


def _verify_routing(model: DualHeadModel, example: Tensor) -> list[str]:
    if not any(parameter.requires_grad for parameter in model.encoder_parameters()):
        raise ValueError(
            "Expected `model` to have an encoder to refine, but all its parameters are frozen: call "
            "`model.requires_grad_(True)`."
        )
    names, parameters = zip(*model.named_parameters(), strict=True)
    with trainable(model), evaluating(model):
        for_heads, for_encoder = model.routed(example)
        leak = _gradients(for_heads, model.encoder_parameters())
        everything = _gradients((*for_heads, *for_encoder), parameters)
    if any(gradient is not None and bool(gradient.any()) for gradient in leak):
        raise HeadNotFoundError(
            f"Expected the classifier {model.head!r} to see its features only through its arguments, but a gradient of "
            "the heads reached the encoder: pass the `head` whose forward takes the features as tensors."
        )
    return [name for name, gradient in zip(names, everything, strict=True) if gradient is None]


def _gradients(logits: tuple[Tensor, ...], parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    total = torch.stack([z.square().sum() for z in logits]).sum()
    return torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)

"""Which parameters a value depends on."""

from collections.abc import Sequence

from torch import Tensor, nn


def gradients_of(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of a scalar, `None` for parameters that it does not depend on; their own `grad` stays as it was.

    `torch.autograd.grad` does not pass reentrant checkpoints, so this is a backward pass.
    """
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    if value.requires_grad:  # labels do not
        value.backward(retain_graph=True)
    found = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, earlier, strict=True):
        parameter.grad = gradient
    return found

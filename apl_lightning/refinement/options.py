"""What refinement modules make of their options."""

import copy
import math
from functools import partial
from typing import Any, get_args

from torch import Tensor, nn

from apl_lightning.heads import DualHeadModel, add_dual_heads


def with_dual_heads(
    model: nn.Module,
    num_classes: int,
    head: str | None,
    aux: str,
    example: Tensor | None,
    main_output: int | None,
    network: str | None,
) -> DualHeadModel:
    """A copy of a network with two heads, of which the other options say how; they need a plain network."""
    if not isinstance(model, DualHeadModel):
        return add_dual_heads(model, num_classes, head, aux, example, main_output, network)
    options = {"head": head, "example": example, "main_output": main_output, "network": network}
    options["aux"] = None if aux == "auto" else aux
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(
            f"Expected no `{given[0]}` with a model that has two heads already: pass it to `add_dual_heads`, or a "
            "plain network here."
        )
    twin = copy.deepcopy(model)
    twin.release()
    return twin


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise a `ValueError` unless a value is one of the choices of a `Literal` type."""
    if value not in get_args(choices):
        raise ValueError(f"Expected `{name}` to be one of {get_args(choices)}, but got {value!r}.")


def check_options(optimizer: Any, dice_weight: float, dropout: bool) -> None:
    """Raise an error that says what to pass in place of an option out of its range."""
    if not callable(optimizer):
        raise TypeError(
            f"Expected `optimizer` to be a class such as `torch.optim.SGD`, or a partial of one, but got "
            f"{optimizer!r:.60}: pass the class, and `learning_rate`."
        )
    # The command line makes partials too, of a function, with the default of `lr`.
    if isinstance(optimizer, partial) and isinstance(optimizer.func, type) and "lr" in optimizer.keywords:
        raise ValueError(
            f"Expected `optimizer` without a learning rate, but got lr={optimizer.keywords['lr']}: pass it as "
            "`learning_rate`."
        )
    if not 0 <= dice_weight < math.inf:
        raise ValueError(
            f"Expected `dice_weight` to be at least 0 and finite, but got {dice_weight}: 0 is cross-entropy alone."
        )
    if not isinstance(dropout, bool):
        raise TypeError(
            f"Expected `dropout` to be True or False, but got {dropout!r}: set rates in the layers of the network."
        )

"""Checks of the options of refinement modules."""

import math
from functools import partial
from typing import Any, get_args


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

"""Methods of a class that an instance must not call."""

from collections.abc import Callable
from functools import partial
from typing import Any


class class_only:  # noqa: N801 - a decorator, as `classmethod`
    """A `classmethod` that raises a `TypeError` when it is called on an instance, which it would not change."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        """The method, bound to the class."""
        name = self._method.__name__
        if instance is not None:
            raise TypeError(
                f"Expected `{owner.__name__}.{name}`, which returns a new object, but it cannot be called on an "
                "instance: call it on the class."
            )
        return partial(self._method, owner)

"""Packages that only an extra installs, imported where they are used."""

from importlib import import_module
from typing import Any


def package(name: str, extra: str, why: str) -> Any:
    """A module; an `ImportError` that says `why` it is needed and names the extra if it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        # One that is there but broken says so itself.
        detail = "" if isinstance(error, ModuleNotFoundError) else f", but it cannot be imported ({error})"
        raise ImportError(f"{why}{detail}: `pip install -e 'PATH/TO/apl-lightning[{extra}]'`.") from error

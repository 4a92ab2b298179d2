"""Which of the two packages of Lightning something belongs to, found without importing either."""

import sys

# Where the classes of this package for each package of Lightning are.
DOORS = {"pytorch_lightning": "apl_lightning", "lightning.pytorch": "apl_lightning.lightning_pytorch"}


def is_a(thing: object, *names: str) -> bool:
    """Whether the class of an object, or one that it inherits from, has one of these names, in either package."""
    return any(base.__name__ in names for base in type(thing).__mro__)


def package_of(thing: object) -> str | None:
    """The package of Lightning that an object's class inherits from."""
    modules = [f"{base.__module__}." for base in type(thing).__mro__]
    return next((package for module in modules for package in DOORS if module.startswith(f"{package}.")), None)


def overrides(module: object, method: str) -> bool:
    """Whether a module or data module has its own version of a method; `from_datasets` sets it on the object."""
    if method in vars(module):
        return True
    owner = next(base for base in type(module).__mro__ if method in vars(base))
    return not owner.__module__.startswith(tuple(f"{package}." for package in DOORS))


def require_lightning(thing: object) -> None:
    """Raise a `TypeError` for a class without a base class of Lightning: two that inherit from it have one each."""
    if package_of(thing) is None:
        base = next(base for base in type(thing).__mro__ if base.__module__.startswith("apl_lightning."))
        name = base.__name__
        doors = " or ".join(f"`from {door} import {name}` for `{package}`" for package, door in DOORS.items())
        raise TypeError(f"Expected a class of Lightning, but got {base.__module__}.{name}: {doors}.")


def refuse_pairing(thing: object, package: str | None) -> None:
    """Raise a `TypeError` if `thing` belongs to another package of Lightning than `package`, that of the trainer."""
    own, name = package_of(thing), type(thing).__name__
    if own and package and own != package:
        raise TypeError(
            f"Expected a trainer of `{own}` for {name}, but got one of `{package}`, which has its own classes: "
            f"`from {DOORS[package]} import {name}`, and so for the module and its data."
        )


def refuse_other_package(thing: object) -> None:
    """Raise a `TypeError` if the caller was called by the other package than that of `thing`.

    A trainer of that package would say that a module is no `LightningModule`. Two properties raise this error before:
    `state_key`, which a new trainer reads of each callback, and `__class__`, which it reads of a module.
    """
    caller = f"{sys._getframe(2).f_globals.get('__name__')}."
    for package in DOORS:
        if caller.startswith(f"{package}."):
            refuse_pairing(thing, package)

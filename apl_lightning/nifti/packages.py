"""Packages of the extra `nifti`, imported where they are used."""

import importlib
from typing import Any


def package(name: str) -> Any:
    """A module of MONAI, nibabel or matplotlib; an `ImportError` that names the extra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Expected the package {name.split('.')[0]} for NIfTI files, but it cannot be imported ({error}): "
            "pip install 'apl-lightning[nifti]'."
        ) from error

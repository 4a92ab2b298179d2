"""Packages of the extra `nifti`."""

from typing import Any

from apl_lightning._support import packages


def package(name: str) -> Any:
    """A module of MONAI, nibabel or matplotlib."""
    return packages.package(name, "nifti", f"NIfTI files need {name.split('.')[0]}")

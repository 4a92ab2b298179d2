"""The error for files that cannot be used."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file that is no checkpoint, a damaged one, or one of another network."""

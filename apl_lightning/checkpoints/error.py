"""The exception for checkpoint files that cannot be loaded."""


class CheckpointError(ValueError):
    """A file is not a checkpoint, is damaged, or contains a different network than requested."""

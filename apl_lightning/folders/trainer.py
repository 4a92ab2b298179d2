"""The trainer of a run that needs no project."""

from typing import Any

from apl_lightning.pytorch_lightning import PseudoLabelCallback, Trainer


def one_process_trainer(options: dict[str, Any]) -> Trainer:
    """A trainer on one device that makes pseudo labels; it logs nothing and saves no checkpoints by default.

    Args:
        options: Arguments of `Trainer`, which come before these defaults; its callbacks are added.

    Raises:
        ValueError: If they ask for several processes.
    """
    if several := [name for name in ("devices", "num_nodes") if options.get(name, 1) not in (1, "1")]:
        raise ValueError(
            f"Expected one process, but got {several[0]}={options[several[0]]!r}: for several, write the run with "
            "`APLModule` and `TargetDataModule`; the folds of an nnU-Net can be refined in a process each, with "
            "folds=[0], say, and an `out` of its own."
        )
    defaults = {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(**{**defaults, **options, "callbacks": [PseudoLabelCallback(), *options.get("callbacks", [])]})

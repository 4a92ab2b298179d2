"""Which of Lightning's strategies a label pass can run under."""

from __future__ import annotations

from apl_lightning._lightning import Trainer

# By name: importing them would need packages that are not there.
_PARTED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}


def refuse_parted(trainer: Trainer) -> None:
    """Raise where processes hold parts of the network: then none can label images by itself.

    Raises:
        ValueError: Under FSDP, DeepSpeed and ModelParallel.
    """
    name = type(trainer.strategy).__name__
    if _PARTED & {base.__name__ for base in type(trainer.strategy).__mro__}:
        raise ValueError(
            f"Expected a strategy with the whole network on each device, but got {name}: its processes hold parts, and "
            "none can make pseudo labels for itself. Use strategy='ddp' or a single device."
        )

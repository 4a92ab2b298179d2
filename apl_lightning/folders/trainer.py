"""The trainer of a run that needs no project."""

from typing import Any

from apl_lightning._support.lightning import root_device
from apl_lightning.preflight import preflight
from apl_lightning.pytorch_lightning import APLModule, PseudoLabelCallback, Trainer


def one_process_trainer(options: dict[str, Any]) -> Trainer:
    """A trainer on one device that makes pseudo labels; it logs nothing and saves no checkpoints by default.

    Args:
        options: Arguments of `Trainer`, which override the defaults; callbacks are added, and a `PseudoLabelCallback`
            among them takes the place of the default one.

    Raises:
        ValueError: If they ask for several processes.
    """
    for name in ("devices", "num_nodes"):
        if (count := options.get(name, 1)) not in (1, "1") and not (isinstance(count, list) and len(count) == 1):
            raise ValueError(
                f"Expected one process, but got {name}={count!r}: write a run on several with `APLModule` and "
                "`TargetDataModule`, or refine each fold of an nnU-Net in a process of its own, with `folds=[0]` and "
                "an `out` of its own."
            )
    callbacks = options.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    if not any(isinstance(callback, PseudoLabelCallback) for callback in callbacks):
        callbacks.insert(0, PseudoLabelCallback())
    defaults = {"devices": 1, "logger": False, "enable_checkpointing": False}
    return Trainer(**{**defaults, **options, "callbacks": callbacks})


def check_images(trainer: Trainer, module: APLModule, images: Any) -> None:
    """Run preflight on the trainer's device, which warns of images that look wrong to the module's network."""
    module.to(root_device(trainer))
    preflight(module, images, num_classes=len(module.class_names), inferer=module.inferer).warn()

"""The one door to Lightning: its classes, and a named function for everything of it that is not public API.

Lightning is two packages with the same classes, `pytorch_lightning` and `lightning.pytorch`. Nothing here imports one:
what a function needs, it takes from the package of its trainer. The classes of this package get their Lightning base
class in `apl_lightning/pytorch_lightning.py` and `apl_lightning/lightning_pytorch.py`.
"""

import copy
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from apl_lightning._support.lightning_package import is_a, package_of, refuse_pairing
from apl_lightning._support.random_state import isolated_random_state

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.callbacks import ProgressBar
else:
    Callback = LightningDataModule = LightningModule = object
    Trainer = ProgressBar = Any

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that dies of SIGTERM

# By name: importing them needs packages that may be missing.
_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}
_OF_EPOCHS = ("Checkpoint", "EarlyStopping", "ThroughputMonitor")  # callbacks that count the validations of epochs


class SIGTERMException(SystemExit):
    """What ends a run after SIGTERM, as Lightning's loops do with a class of this name in each package."""


@contextmanager
def as_validation(trainer: Trainer) -> Iterator[None]:
    """During a fit, the state of the trainer in validation."""
    stage = trainer.state.stage
    if trainer.training and stage is not None:
        trainer.state.stage = type(stage).VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def attached_callbacks(module: LightningModule) -> Sequence[Callback]:
    """The callbacks of the module's trainer; none without a trainer."""
    trainer: Any = module._trainer
    return () if trainer is None else trainer.callbacks


def autocast(trainer: Trainer) -> AbstractContextManager[Any]:
    """The context of a forward pass in the trainer's precision."""
    return trainer.precision_plugin.forward_context()


def batches_started(trainer: Trainer) -> int:
    """How many training batches of the current epoch have been fetched, those before a resume included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def continue_stopped_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a run that `max_steps` has stopped within an epoch resume there; Lightning counts that epoch as done.

    With `max_steps` it also counts an epoch twice at whose end a checkpoint was saved, and it skips an epoch that was
    not yet started, as in the label pass before it.
    """
    fit = checkpoint.get("loops", {}).get("fit_loop")
    if fit is None:
        return
    is_within = not fit["epoch_loop.batch_progress"]["is_last_batch"] or trainer.max_steps != -1
    for progress in (fit["epoch_progress"]["current"], fit["epoch_progress"]["total"]):
        progress["ready"] = min(progress["ready"], progress["started"])
        if is_within and progress["ready"] > 0:  # 0 before the first epoch
            progress["processed"] = progress["completed"] = progress["ready"] - 1


def copy_without_trainer(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy with a memo; of a LightningModule without the trainer that it is attached to."""
    return copy.deepcopy(model, {**(memo or {}), id(getattr(model, "_trainer", None)): None})


def ends_after_sigterm(error: BaseException | None) -> bool:
    """Whether an exception is what ends a run after SIGTERM, Lightning's or ours."""
    return is_a(error, "SIGTERMException")


def has_finished(trainer: Trainer) -> bool:
    """Whether no training step is left."""
    return trainer.fit_loop.done


def log_hyperparameters(trainer: Trainer, module: LightningModule, values: dict[str, Any]) -> None:
    """Log values together with the module's hyperparameters, unless the trainer logs none; call it in `on_fit_start`.

    Lightning logs the module's alone directly afterwards, which adds nothing. TensorBoard shows the first ones only.
    """
    if trainer.enable_autolog_hparams:
        own = module.hparams_initial if module._log_hyperparams else {}
        for logger in trainer.loggers:
            logger.log_hyperparams({**values, **own})


@contextmanager
def on_root_device(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The module on the device of this rank; before `on_fit_end` Lightning moves it to the CPU."""
    module.to(root_device(trainer))
    try:
        yield
    finally:
        module.cpu()


def loader_in_use(trainer: Trainer) -> str:
    """The loader whose batches the trainer reads: `"train"`, `"val"`, `"test"` or `"predict"`."""
    stages = {"test": trainer.testing, "predict": trainer.predicting, "train": trainer.training}
    return next((name for name, running in stages.items() if running), "val")


def progress_bar(trainer: Trainer) -> ProgressBar | None:
    """The bar that is shown on this rank, if any."""
    bar: ProgressBar | None = trainer.progress_bar_callback
    return bar if trainer.is_global_zero and not getattr(bar, "is_disabled", False) else None


def record_sigterm(trainer: Trainer, number: int) -> None:
    """Mark SIGTERM as received, which the loops share before each batch, and pass it on to launched processes."""
    connector = trainer._signal_connector
    if not connector.received_sigterm and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(number)
    connector.received_sigterm = True


def refuse_half_weights(trainer: Trainer) -> None:
    """Raise a `ValueError` with a precision that converts the weights to float16 or bfloat16."""
    if str(trainer.precision).endswith("-true") and str(trainer.precision)[:2] in ("16", "bf"):
        raise ValueError(
            f"Expected weights in float32, but got precision={trainer.precision!r}, which rounds small steps away: "
            "pass precision='bf16-mixed'."
        )


def refuse_other_data(trainer: Trainer) -> None:
    """Raise a `TypeError` for a data module of the other package, which the trainer takes for a loader."""
    refuse_pairing(trainer.fit_loop._data_source.instance, package_of(trainer))


def refuse_sharded(trainer: Trainer) -> None:
    """Raise a `ValueError` if each process holds only a part of the network: FSDP, DeepSpeed and ModelParallel."""
    name = type(trainer.strategy).__name__
    if _SHARDED & {base.__name__ for base in type(trainer.strategy).__mro__}:
        raise ValueError(
            f"Expected a strategy with the whole network on each device, but got {name}, whose processes hold parts "
            "and cannot make pseudo labels on their own: use strategy='ddp' or a single device."
        )


def refuse_tuner(trainer: Trainer) -> None:
    """Raise a `ValueError` with the callbacks of Lightning's `Tuner`: their trial steps run without other callbacks."""
    if found := _names_of(trainer, "BatchSizeFinder", "LearningRateFinder"):
        raise ValueError(
            f"Expected no `{found[0]}`, which `Tuner` adds too: it tries steps without other callbacks, so without "
            "pseudo labels. Make a new trainer, and pass `learning_rate` to the module and `batch_size` to "
            "`TargetDataModule`."
        )


def refuse_weight_averaging(trainer: Trainer) -> None:
    """Raise a `ValueError` with Lightning's averages of weights: they replace the network that the guard chooses."""
    if found := _names_of(trainer, "StochasticWeightAveraging", "WeightAveraging"):
        raise ValueError(
            f"Expected no `{found[0]}`, which replaces the network at the end: use `ema_decay`, which averages the "
            "weights already."
        )


def root_device(trainer: Trainer) -> torch.device:
    """The device of this process."""
    return trainer.strategy.root_device


def to_device(trainer: Trainer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as a training step gets it: in the trainer's precision, on the device, after all transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    moved: dict[str, Tensor] = trainer.strategy.batch_to_device(batch)
    return moved


def validate(trainer: Trainer) -> None:
    """Validate within a fit, as after an epoch, if the fit validates at all; random numbers stay as they are.

    Checkpoints, early stopping and the throughput monitor do not see it: they count the validations of epochs.
    """
    if not trainer.enable_validation:
        return
    connected: Any = trainer
    loop, callbacks = trainer.fit_loop.epoch_loop.val_loop, connected.callbacks
    connected.callbacks = [each for each in callbacks if not is_a(each, *_OF_EPOCHS)]
    loop.restarting = False
    try:
        with as_validation(trainer), isolated_random_state(cuda=True):
            loop.run()
    finally:
        connected.callbacks = callbacks
    import_module(f"{package_of(trainer)}.loops.utilities")._reset_progress(loop)


def _names_of(trainer: Trainer, *kinds: str) -> list[str]:
    """The class names of the trainer's callbacks of these kinds."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return [type(each).__name__ for each in callbacks if is_a(each, *kinds)]

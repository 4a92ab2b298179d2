"""SIGTERM, as a scheduler sends it: every rank stops before its next batch, and none waits for another."""

import signal
import threading
import warnings
from typing import Any

from apl_lightning._support.distributed import is_distributed
from apl_lightning._support.lightning import SIGTERM_EXIT_CODE, SIGTERMException, Trainer, record_sigterm


def stop_at_next_batch(trainer: Trainer) -> None:
    """With several ranks, let SIGTERM only set a flag, which Lightning's loops share before each batch.

    Lightning's own handler runs a collective inside the signal handler. If the signal interrupts another collective,
    all ranks wait for ever. Lightning restores the previous handlers when the fit ends.
    """
    if is_distributed() and threading.current_thread() is threading.main_thread():

        def handle(number: int, _frame: Any) -> None:
            record_sigterm(trainer, number)

        signal.signal(signal.SIGTERM, handle)


def raise_if_stopped(trainer: Trainer) -> None:
    """End a long pass early, as Lightning ends its loops, if this rank has received SIGTERM."""
    if trainer.received_sigterm:
        raise SIGTERMException(SIGTERM_EXIT_CODE)


def end_as_terminated(trainer: Trainer, stop: Any) -> None:
    """Say that SIGTERM ended the run, and let the process exit with 143, as one that dies of SIGTERM."""
    # One process per node: Lightning's launcher kills all others as soon as one that it has launched fails.
    stop.code = SIGTERM_EXIT_CODE if trainer.local_rank == 0 else 0
    if trainer.is_global_zero:
        saved = any(getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks)
        cure = (
            "resume it with `trainer.fit(module, data, ckpt_path='last')`"
            if saved
            else "it has saved no checkpoint `last` to resume from: pass `ModelCheckpoint(save_last=True, "
            "every_n_train_steps=100)`"
        )
        warnings.warn(f"SIGTERM: the run stops before its next batch, with exit code 143; {cure}.", stacklevel=2)

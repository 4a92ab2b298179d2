"""SIGTERM, as a scheduler sends it: every rank stops before its next batch, and none waits for another."""

import signal
import threading
from typing import Any

from apl_lightning._support.distributed import is_distributed
from apl_lightning._support.lightning import Trainer, record_sigterm


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
    """End a long pass early with a `RuntimeError` if this rank has received SIGTERM."""
    if trainer.received_sigterm:
        raise RuntimeError("SIGTERM: stopped. Resume from the last checkpoint, ckpt_path='last'.")

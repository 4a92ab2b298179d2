"""SIGTERM, the scheduler's notice: every rank stops at the next batch, and none waits for another."""

from __future__ import annotations

import signal
import threading
from typing import Any

from apl_lightning import ranks
from apl_lightning._lightning import Trainer


def stop_at_next_batch(trainer: Trainer) -> None:
    """With several ranks, let SIGTERM only leave a note, which Lightning's loop shares before each batch.

    Lightning's own handler talks to the other ranks from within the signal, which may fall between two halves of a
    collective: then all of them wait for ever. Its handlers of before the fit come back after it, as always.
    """
    if not ranks.several() or threading.current_thread() is not threading.main_thread():
        return

    def note(number: int, _frame: Any) -> None:
        connector = trainer._signal_connector
        if not connector.received_sigterm and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)
        connector.received_sigterm = True

    signal.signal(signal.SIGTERM, note)


def raise_if_stopped(trainer: Trainer) -> None:
    """End a long pass early.

    Raises:
        RuntimeError: If this rank received SIGTERM.
    """
    if trainer.received_sigterm:
        raise RuntimeError("SIGTERM: stopped. Resume from the last checkpoint, ckpt_path='last'.")

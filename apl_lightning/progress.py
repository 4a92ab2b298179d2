"""A progress bar for the label pass, beside the one that the trainer already shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

from apl_lightning._lightning import RichProgressBar, Trainer

T = TypeVar("T")


def track(trainer: Trainer, items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items` under a bar of the trainer's kind: TQDM, Rich, or none where progress is off."""
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or getattr(bar, "is_disabled", False):
        yield from items
    elif isinstance(bar, RichProgressBar):
        yield from _track_rich(bar, items, description, total)
    else:
        yield from tqdm(items, desc=description, total=total, leave=False, dynamic_ncols=True)


def _track_rich(bar: RichProgressBar, items: Iterable[T], description: str, total: int) -> Iterator[T]:
    progress = bar.progress
    if progress is None:
        yield from items
        return
    task = progress.add_task(description, total=total)
    try:
        for item in items:
            yield item
            progress.advance(task)
            progress.refresh()
    finally:
        progress.remove_task(task)

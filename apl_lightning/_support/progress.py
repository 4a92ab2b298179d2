"""The progress bar of a pass over the target images."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

from apl_lightning._support.lightning import ProgressBar, Trainer, progress_bar
from apl_lightning._support.lightning_package import is_a

T = TypeVar("T")


def track(trainer: Trainer, items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items` under a bar of the trainer's kind: TQDM, Rich, or none."""
    bar = progress_bar(trainer)
    if bar is None:
        yield from items
    elif is_a(bar, "RichProgressBar"):
        yield from _track_rich(bar, items, description, total)
    else:
        yield from tqdm(items, desc=description, total=total, leave=False, dynamic_ncols=True)


def _track_rich(bar: ProgressBar, items: Iterable[T], description: str, total: int) -> Iterator[T]:
    progress: Any = bar.progress  # type: ignore[attr-defined]  # `None` before it starts
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

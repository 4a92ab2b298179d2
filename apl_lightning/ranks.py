"""What several processes must agree on; with one process each function does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn


def world_size() -> int:
    """How many processes take part."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def several() -> bool:
    """Whether more than one process takes part."""
    return world_size() > 1


def rank() -> int:
    """Which of them this one is."""
    return distributed.get_rank() if several() else 0


def broadcast(value: Any, source: int) -> Any:
    """The value of one rank, on all."""
    if several():
        values = [value]
        distributed.broadcast_object_list(values, src=source)
        value = values[0]
    return value


def gather(value: Any) -> list[Any]:
    """The value of every rank, in their order."""
    if not several():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def total(value: Tensor) -> Tensor:
    """The sum over ranks."""
    if several():
        value = value.clone()
        distributed.all_reduce(value)
    return value


def total_of_counts(counts: Tensor, device: torch.device) -> Tensor:
    """The sum over ranks of counts in float64 on the CPU, by way of the device that the ranks talk through."""
    # Counts stay exact in float64; MPS has none, but no collective either.
    return total(counts.to(device)).cpu() if device.type != "mps" else counts


def share_state(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0; BatchNorm's buffers differ under DDP."""
    if several():
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                distributed.broadcast(tensor.data, src=0)


@contextmanager
def together(what: str) -> Iterator[None]:
    """Leave the block when all ranks are through it; an error on one is raised on every rank.

    So no rank waits for one that is gone. Any other collective in the block must be reached by all ranks.

    Args:
        what: What all of them do, for the message.

    Raises:
        RuntimeError: If any rank met an error; with one process the error itself.
    """
    error = None
    try:
        yield
    except Exception as caught:
        if not several():
            raise
        error = caught
    if not several():
        return
    errors = {rank: text for rank, text in enumerate(gather(error and f"{type(error).__name__}: {error}")) if text}
    if errors:
        first = next(iter(errors.values()))
        raise RuntimeError(f"{what} failed on ranks {list(errors)}: {first}") from error

"""Communication between processes; with a single process every function returns at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from apl_lightning._support.lightning import SIGTERM_EXIT_CODE, SIGTERMException, ends_after_sigterm


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return world_size() > 1


def rank() -> int:
    """The rank of this process."""
    return distributed.get_rank() if is_distributed() else 0


def refuse_left_over_group(processes: int) -> None:
    """Raise a `RuntimeError` if one process refines within the group of several, such as that of an earlier fit.

    Under DDP all processes run the rest of a script, so each would refine on its own and wait for the others.
    """
    if is_distributed() and processes == 1:
        raise RuntimeError(
            f"Expected a trainer with all {world_size()} processes of the group that is still there, from an earlier "
            "fit, but got one on a single device: refine in a script of its own."
        )


def broadcast(value: Any, source: int = 0) -> Any:
    """The value of the rank `source`, on all ranks."""
    values = [value]
    if is_distributed():
        distributed.broadcast_object_list(values, src=source)
    return values[0]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in order of rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def total(value: Tensor) -> Tensor:
    """The sum over ranks."""
    if is_distributed():
        value = value.clone()
        distributed.all_reduce(value)
    return value


def total_of_counts(counts: Tensor, device: torch.device) -> Tensor:
    """The sum over ranks of counts on the CPU, integers or float64; the ranks communicate through `device`."""
    # MPS has no float64, but no collectives either.
    return total(counts.to(device)).cpu() if device.type != "mps" else counts


@torch.no_grad()
def share_state(module: nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks."""
    if is_distributed():
        for parameter in module.parameters():
            distributed.broadcast(parameter.data, src=0)
    share_buffers(module)


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks: under DDP those of BatchNorm differ, and parameters do not."""
    if not is_distributed():
        return
    buffers = list(module.buffers())
    # They are small and many: together they take one message instead of hundreds. All ranks need the same order.
    for kind in dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers):
        alike = [buffer for buffer in buffers if (buffer.dtype, buffer.device) == kind]
        together = torch.cat([buffer.flatten() for buffer in alike])
        distributed.broadcast(together, src=0)
        for buffer, values in zip(alike, together.split([buffer.numel() for buffer in alike]), strict=True):
            buffer.copy_(values.view_as(buffer))


@contextmanager
def all_or_none(task: str) -> Iterator[None]:
    """Run a block on all ranks; an error on one rank is raised on every rank as a `RuntimeError` that names `task`.

    No rank waits for one that has failed. All ranks must reach every other collective in the block. A rank that SIGTERM
    has stopped stops all.
    """
    if not is_distributed():
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        if not isinstance(caught, Exception) and not ends_after_sigterm(caught):
            raise
        error = caught
    outcomes = gather((ends_after_sigterm(error), error and f"{type(error).__name__}: {error}"))
    if any(stopped for stopped, _ in outcomes):
        raise SIGTERMException(SIGTERM_EXIT_CODE) from error
    errors = {rank: text for rank, (_, text) in enumerate(outcomes) if text}
    if errors:
        first = next(iter(errors.values()))
        raise RuntimeError(f"{task} failed on ranks {list(errors)}: {first}") from error


def once_per_node(local_rank: int, task: str, action: Callable[[], object]) -> None:
    """Run an action on one rank of each node, within `all_or_none`."""
    with all_or_none(task):
        if local_rank == 0:
            action()

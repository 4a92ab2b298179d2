"""Nodes receive missing files of other ranks completely, or all ranks raise the same error."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as distributed

from apl_lightning.store import complete_round, sync_nodes
from apl_lightning.store.round_files import rank_files

PATIENCE = 60
SIZE = 3 * sync_nodes._PIECE + 17


def processes(count: int, task: Callable[[int], Any], meeting: Path) -> list[Any]:
    """Run a task on each rank of a gloo group; return the results, or the messages of the errors."""
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()

    def run(rank: int) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
        try:
            queue.put((rank, task(rank)))
        except Exception as error:
            queue.put((rank, str(error)))
        distributed.destroy_process_group()

    started = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    found = dict(queue.get(timeout=PATIENCE) for _ in started)
    for process in started:
        process.join(PATIENCE)
    return [found[rank] for rank in range(count)]


def content(rank: int) -> bytes:
    return bytes([rank + 1]) * (SIZE if rank != 2 else 0)


def write(folder: Path, rank: int) -> None:
    folder.mkdir(exist_ok=True)
    data, table = rank_files(folder, rank)
    data.write_bytes(content(rank))
    table.write_bytes(b"table %d" % rank)


def test_nodes_receive_missing_files(tmp_path: Path) -> None:
    """Ranks 0 and 1 share a disk; rank 2, which has no sample, and rank 3 have their own disks."""
    node = {0: "a", 1: "a", 2: "b", 3: "c"}

    def task(rank: int) -> None:
        write(tmp_path / node[rank], rank)
        distributed.barrier()
        complete_round(tmp_path / node[rank], responsible=rank != 1)

    assert processes(4, task, tmp_path / "meeting") == [None] * 4
    for folder in ("a", "b", "c"):
        for rank in range(4):
            data, table = rank_files(tmp_path / folder, rank)
            assert data.read_bytes() == content(rank)
            assert table.read_bytes() == b"table %d" % rank
        assert len(list((tmp_path / folder).iterdir())) == 8, "no temporary files are left"


def test_no_file_is_sent_on_a_shared_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("sent")

    monkeypatch.setattr(sync_nodes, "_send", fail)

    def task(rank: int) -> None:
        write(tmp_path / "disk", rank)
        distributed.barrier()
        complete_round(tmp_path / "disk", responsible=True)

    assert processes(2, task, tmp_path / "meeting") == [None, None]


@pytest.mark.parametrize("broken", ["full disk", "lost file"])
def test_error_is_raised_on_all_ranks(tmp_path: Path, broken: str) -> None:
    def task(rank: int) -> None:
        write(tmp_path / str(rank), rank)
        distributed.barrier()
        if rank == 1 and broken == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        if rank == 0 and broken == "lost file":
            os.remove(rank_files(tmp_path / "0", 0)[0])
        complete_round(tmp_path / str(rank), responsible=True)

    messages = processes(2, task, tmp_path / "meeting")
    reason = "File too large" if broken == "full disk" else "No such file"
    assert messages[0] == messages[1]
    assert "Sending pseudo labels of rank 0 failed on ranks" in messages[0]
    assert reason in messages[0]

"""Launched processes: `ddp`, `ddp_spawn`, torchrun, several nodes with and without a shared disk, SIGTERM."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import launched_run
import pytest
import torch

SCRIPT = launched_run.__file__
PYTHON = [sys.executable, "-W", "ignore", SCRIPT]
DDP = ["--strategy", "ddp"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PATIENCE = 120  # timeout in seconds; a run takes about 10
# Launched processes import the package of this checkout, also where another one is installed.
PATHS = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, timeout=PATIENCE, capture_output=True, text=True)


def ends(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("end-*.pt"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final state of a run in one process, with augmentation. A fork needs no new imports."""
    folder = tmp_path_factory.mktemp("one")

    def fit() -> None:
        warnings.simplefilter("ignore")
        launched_run.main([str(folder)])

    process = multiprocessing.get_context("fork").Process(target=fit)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    (end,) = ends(folder)
    return end


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run with two `ddp` processes."""
    folder = tmp_path_factory.mktemp("ddp")
    finished = run(*PYTHON, str(folder), *DDP, "--devices", "2")
    assert finished.returncode == 0, finished.stderr
    return folder


def assert_close(end: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare weights, labels and Dice after three epochs within float tolerance."""
    for name, value in expected["state"].items():
        torch.testing.assert_close(end["state"][name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert (end["labels"][:, 0] == expected["labels"][:, 0]).float().mean() > 0.999
    torch.testing.assert_close(end["labels"][:, 1], expected["labels"][:, 1], atol=2 / 255, rtol=0)
    assert end["dice"] == pytest.approx(expected["dice"], abs=1e-3)


def assert_equals_one(folder: Path, one: dict[str, Any]) -> None:
    """Both ranks end with the same state, which is that of one process."""
    first, second = ends(folder)
    assert_close(first, one)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert torch.equal(first["labels"], second["labels"])


def test_two_ddp_processes_equal_one(ddp: Path, one: dict[str, Any]) -> None:
    assert_equals_one(ddp, one)


def test_terminated_job_resumes_exactly(tmp_path: Path, ddp: Path) -> None:
    """SIGTERM at rank 0 during step 4 stops both ranks after it; the resumed run equals the uninterrupted one."""
    command = [*PYTHON, str(tmp_path), *DDP, "--devices", "2"]
    stopped = run(*command, "--terminate-at", "4")
    assert stopped.returncode == 143
    assert not ends(tmp_path), "the run stops before its end"
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 4
    finished = run(*command)
    assert finished.returncode == 0, finished.stderr
    for mine, expected in zip(ends(tmp_path), ends(ddp), strict=True):
        assert all(torch.equal(mine["state"][name], value) for name, value in expected["state"].items())
        assert torch.equal(mine["labels"], expected["labels"])


def test_two_spawned_processes_equal_one(tmp_path: Path, one: dict[str, Any]) -> None:
    finished = run(*PYTHON, str(tmp_path), "--strategy", "ddp_spawn", "--devices", "2")
    assert finished.returncode == 0, finished.stderr
    assert_equals_one(tmp_path, one)


def test_two_nodes_without_a_shared_disk(tmp_path: Path, one: dict[str, Any]) -> None:
    """With one, `store/test_sync_nodes.py` shows that no file is sent."""
    nodes, devices = 2, 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = str(tmp_path / "node-{node}")
    place = ["--master-addr", "127.0.0.1", "--master-port", port]
    sizes = ["--nnodes", str(nodes), "--nproc-per-node", str(devices)]
    options = [*DDP, "--nodes", str(nodes), "--devices", str(devices)]
    commands = [[*TORCHRUN, *place, *sizes, "--node-rank", str(node), SCRIPT, out, *options] for node in range(nodes)]
    started = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    found = [end for folder in sorted(tmp_path.iterdir()) for end in ends(folder)]
    assert len(found) == nodes * devices
    for end in found:
        assert_close(end, one)
        assert torch.equal(end["labels"], found[0]["labels"])
    stores = list(tmp_path.glob("*/labels/*"))
    assert len(stores) == nodes
    contents = [{path.name: path.read_bytes() for path in store.glob("round-*/rank-*.bin")} for store in stores]
    assert all(content == contents[0] for content in contents), "each node has the files of all ranks"

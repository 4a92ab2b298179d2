"""Processes as people launch them: `ddp`, `ddp_spawn`, torchrun, several nodes without a shared disk, SIGTERM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = str(Path(__file__).parent / "launched_run.py")
PYTHON = [sys.executable, "-W", "ignore", SCRIPT]
DDP = ["--strategy", "ddp"]
PATIENCE = 120  # seconds; a run takes 10


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=environment, timeout=PATIENCE, capture_output=True, text=True)


def ends(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("end-*.pt"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process gives, with augmentation on."""
    folder = tmp_path_factory.mktemp("one")
    assert run(*PYTHON, str(folder)).returncode == 0
    (end,) = ends(folder)
    return end


def assert_close(end: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, labels and Dice after three epochs agree to float tolerance."""
    for name, value in expected["state"].items():
        torch.testing.assert_close(end["state"][name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert (end["labels"][:, 0] == expected["labels"][:, 0]).float().mean() > 0.999
    torch.testing.assert_close(end["labels"][:, 1], expected["labels"][:, 1], atol=2 / 255, rtol=0)
    assert end["dice"] == pytest.approx(expected["dice"], abs=1e-3)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    "launcher",
    [[*PYTHON, "{out}", *DDP], [*PYTHON, "{out}", "--strategy", "ddp_spawn"], [*TORCHRUN, "--nproc-per-node", "2"]],
    ids=["ddp", "ddp_spawn", "torchrun"],
)
def test_two_processes_equal_one(tmp_path: Path, one: dict[str, Any], launcher: list[str]) -> None:
    command = [part.format(out=tmp_path) for part in launcher]
    if "torch.distributed.run" in command:
        command += [SCRIPT, str(tmp_path), *DDP]
    finished = run(*command, "--devices", "2")
    assert finished.returncode == 0, finished.stderr
    first, second = ends(tmp_path)
    assert_close(first, one)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert torch.equal(first["labels"], second["labels"])


@pytest.mark.parametrize(("nodes", "devices", "shared"), [(2, 1, False), (2, 2, False), (2, 1, True)])
def test_nodes_with_and_without_a_shared_disk(
    tmp_path: Path, one: dict[str, Any], nodes: int, devices: int, shared: bool
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = str(tmp_path / ("all" if shared else "node-{node}"))
    place = ["--master-addr", "127.0.0.1", "--master-port", port]
    sizes = ["--nnodes", str(nodes), "--nproc-per-node", str(devices)]
    options = [*DDP, "--nodes", str(nodes), "--devices", str(devices)]
    commands = [[*TORCHRUN, *place, *sizes, "--node-rank", str(node), SCRIPT, out, *options] for node in range(nodes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    found = [end for folder in sorted(tmp_path.iterdir()) for end in ends(folder)]
    assert len(found) == nodes * devices
    for end in found:
        assert_close(end, one)
        assert torch.equal(end["labels"], found[0]["labels"])
    stores = list(tmp_path.glob("*/labels/*"))
    assert len(stores) == (1 if shared else nodes)
    contents = [{path.name: path.read_bytes() for path in store.glob("round-*/rank-*.bin")} for store in stores]
    assert all(content == contents[0] for content in contents), "each node has the files of all ranks"


def test_terminated_job_ends_and_goes_on(tmp_path: Path) -> None:
    command = [*PYTHON, "{out}", *DDP, "--devices", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*[part.format(out=whole) for part in command]).returncode == 0
    command = [part.format(out=cut) for part in command]
    run(*command, "--terminate-at", "4")
    assert not ends(cut), "it stopped before the end"
    finished = run(*command)
    assert finished.returncode == 0, finished.stderr
    for mine, expected in zip(ends(cut), ends(whole), strict=True):
        assert all(torch.equal(mine["state"][name], value) for name, value in expected["state"].items())
        assert torch.equal(mine["labels"], expected["labels"])

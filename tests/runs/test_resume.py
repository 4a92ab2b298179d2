"""A run that is killed at any moment and resumed ends with the same weights, labels and Dice."""

from __future__ import annotations

import os
import random
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.implementations.local as local_files
import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, Slices, TinyNet, fork_further
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from apl_lightning import APLModule, PseudoLabelCallback, PseudoLabelStore, TargetDataModule
from apl_lightning._support.modes import evaluating
from apl_lightning.denoisers import APL
from apl_lightning.metrics import CaseDice
from apl_lightning.store.round_files import RoundWriter
from apl_lightning.store.round_reader import RoundReader

Make = Callable[..., pl.Trainer]
SAMPLES = 8


class DropoutNet(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.append(nn.Dropout2d(0.3))


class Moments:
    """Counts the moments at which a process may be killed, and kills it at the one numbered `fatal`."""

    def __init__(self, fatal: int | None, kind: signal.Signals = signal.SIGKILL) -> None:
        self.fatal = fatal
        self.kind = kind
        self.seen = 0

    def reach(self) -> None:
        self.seen += 1
        if self.seen == self.fatal:
            os.kill(os.getpid(), self.kind)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.reach()
            result = function(*args, **kwargs)
            self.reach()
            return result

        return wrapped

    def watch(self) -> None:
        """Count moments before and after these calls and within the write of a checkpoint; only in a forked process."""
        for owner, names in {
            os: ["replace"],
            APL: ["__call__"],
            PseudoLabelStore: ["start", "join", "publish", "prune"],
            RoundWriter: ["add", "__exit__"],
            RoundReader: ["ignore"],
            APLModule: ["prepare_refinement", "training_step", "validation_step"],
            PseudoLabelCallback: ["on_train_start", "on_train_epoch_start", "on_train_batch_start"],
            ModelCheckpoint: ["_save_checkpoint", "_save_last_checkpoint", "_remove_checkpoint"],
        }.items():
            for name in names:
                setattr(owner, name, self.around(getattr(owner, name)))
        write = local_files.LocalFileOpener.write

        def write_in_two_parts(file: Any, data: bytes) -> int:
            written = write(file, data[: len(data) // 2])
            file.f.flush()
            self.reach()
            return written + write(file, data[len(data) // 2 :])

        local_files.LocalFileOpener.write = write_in_two_parts


class Record(pl.Callback):
    """Saves the final state of each rank for the parent process; kills the process of `rank` at the moment `fatal`."""

    def __init__(self, folder: Path, rank: int = 0, fatal: int | None = None, kind: Any = signal.SIGKILL) -> None:
        self.folder = folder
        self.rank = rank
        self.moments = Moments(fatal, kind)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.moments.fatal = self.moments.fatal if trainer.global_rank == self.rank else None
        self.moments.watch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # A run that is killed after its last step has no logged metrics when it resumes, so compute the Dice again.
        images, labels = (torch.stack(list(column)) for column in zip(*Images(3, labelled=True), strict=True))
        with evaluating(pl_module), torch.no_grad():
            dice = CaseDice(CLASSES)
            dice.update(pl_module(images).main.argmax(1), labels, indices=range(3))
        directory = str(trainer.train_dataloader.dataset.store.directory)
        moments = self.moments.seen
        content = {"state": pl_module.state_dict(), "dice": dice.compute(), "directory": directory, "moments": moments}
        torch.save(content, self.folder / f"end-{trainer.global_rank}.pt")


def fit(make: Make, folder: Path, devices: int, record: Record, every: int, workers: int, dropout: bool = True) -> None:
    torch.manual_seed(0)
    module = APLModule(DropoutNet() if dropout else TinyNet(), CLASSES, dropout=dropout, learning_rate=1e-2)
    data = TargetDataModule(
        Slices(SAMPLES),
        Images(3, labelled=True),
        batch_size=4 // devices,
        store_dir=folder / "labels",
        num_workers=workers,
    )
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=every, save_last=True)
    strategy = {} if devices == 1 else {"devices": devices, "strategy": "ddp_fork"}
    labels = PseudoLabelCallback(largest_component_share=0.0)  # labels of noise have small components
    trainer = make(
        max_epochs=3,
        callbacks=[labels, saving, record],
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        **strategy,
    )
    trainer.fit(module, data, ckpt_path="last", weights_only=False)


def in_a_process(task: Callable[[], None]) -> int:
    """Run a task in a forked process; return its exit code, or the negative number of the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            fork_further()
            warnings.simplefilter("ignore")  # Lightning warns if there is no checkpoint
            task()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Outcome(NamedTuple):
    """Weights, Dice, labels with weights, and the number of moments of each rank at the end of a run."""

    state: dict[str, Tensor]
    dice: Tensor
    labels: bytes
    moments: list[int]


def outcome(folder: Path) -> Outcome:
    ends = [torch.load(path, weights_only=True) for path in sorted(folder.glob("end-*.pt"))]
    store = PseudoLabelStore(ends[0]["directory"], SAMPLES)
    labels = [torch.stack([store.read(i).labels.float(), store.read(i).weights]) for i in range(SAMPLES)]
    moments = [end["moments"] for end in ends]
    return Outcome(ends[0]["state"], ends[0]["dice"], torch.stack(labels).numpy().tobytes(), moments)


def assert_same(ours: Outcome, expected: Outcome) -> None:
    for name, value in expected.state.items():
        assert torch.equal(ours.state[name], value), name
    assert torch.equal(ours.dice, expected.dice)
    assert ours.labels == expected.labels


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The outcome of an uninterrupted run, computed once per set of options."""
    outcomes: dict[Any, Any] = {}

    def uninterrupted(make: Make, *options: Any) -> Outcome:
        if options not in outcomes:
            folder = tmp_path_factory.mktemp("uninterrupted")
            devices, *others = options
            assert in_a_process(lambda: fit(make, folder, devices, Record(folder), *others)) == 0
            outcomes[options] = outcome(folder)
        return outcomes[options]

    return uninterrupted


def moments(count: int, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [chance.random() for _ in range(count)]


@pytest.mark.parametrize("place", moments(20, seed=1), ids=range(20))
def test_killed_anywhere(tmp_path: Path, trainer: Make, reference: Callable[..., Any], place: float) -> None:
    expected = reference(trainer, 1, 1, 0)
    fatal = 1 + int(place * expected.moments[0])
    killed = in_a_process(lambda: fit(trainer, tmp_path, 1, Record(tmp_path, 0, fatal), 1, 0))
    assert killed == -signal.SIGKILL
    assert in_a_process(lambda: fit(trainer, tmp_path, 1, Record(tmp_path), 1, 0)) == 0
    assert_same(outcome(tmp_path), expected)


@pytest.mark.parametrize("place", moments(12, seed=2), ids=range(12))
def test_one_of_two_processes_killed_anywhere(
    tmp_path: Path, trainer: Make, reference: Callable[..., Any], place: float
) -> None:
    """The other process stops too, and both are started again."""
    expected = reference(trainer, 2, 1, 0)
    rank, share = divmod(2 * place, 1)
    record = Record(tmp_path, int(rank), 1 + int(share * expected.moments[int(rank)]))
    assert in_a_process(lambda: fit(trainer, tmp_path, 2, record, 1, 0)) == 1
    assert in_a_process(lambda: fit(trainer, tmp_path, 2, Record(tmp_path), 1, 0)) == 0
    assert_same(outcome(tmp_path), expected)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_resumed_with_another_number_of_processes(
    tmp_path: Path, trainer: Make, reference: Callable[..., Any], first: int, second: int
) -> None:
    """Resume within an epoch. Equal within float tolerance, because two processes sum two gradients."""
    expected = reference(trainer, 1, 1, 0, False)
    record = Record(tmp_path, 0, expected.moments[0] // 2)
    assert in_a_process(lambda: fit(trainer, tmp_path, first, record, 1, 0, dropout=False)) != 0
    assert in_a_process(lambda: fit(trainer, tmp_path, second, Record(tmp_path), 1, 0, dropout=False)) == 0
    ours = outcome(tmp_path)
    for name, value in expected.state.items():
        torch.testing.assert_close(ours.state[name], value, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(ours.dice, expected.dice, atol=1e-3, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [2, 3])
def test_resumed_between_checkpoints(
    tmp_path: Path, trainer: Make, reference: Callable[..., Any], every: int, workers: int
) -> None:
    """Steps after the last checkpoint are repeated, also with persistent workers."""
    expected = reference(trainer, 1, 1, 0)
    record = Record(tmp_path, 0, expected.moments[0] * 2 // 3)
    assert in_a_process(lambda: fit(trainer, tmp_path, 1, record, every, workers)) == -signal.SIGKILL
    assert in_a_process(lambda: fit(trainer, tmp_path, 1, Record(tmp_path), every, workers)) == 0
    assert_same(outcome(tmp_path), expected)


def test_terminated_run_is_resumed(tmp_path: Path, trainer: Make, reference: Callable[..., Any]) -> None:
    """SIGTERM, as a cluster scheduler sends it; `test_launched.py` tests several ranks."""
    expected = reference(trainer, 1, 1, 0)
    record = Record(tmp_path, 0, expected.moments[0] // 2, signal.SIGTERM)
    assert in_a_process(lambda: fit(trainer, tmp_path, 1, record, 1, 0)) != 0
    assert in_a_process(lambda: fit(trainer, tmp_path, 1, Record(tmp_path), 1, 0)) == 0
    assert_same(outcome(tmp_path), expected)

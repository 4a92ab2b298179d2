"""The store returns the labels that were written, publishes only complete rounds and never changes other files."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import flip_a_bit, truncate, zero
from torch import Tensor

from apl_lightning import PseudoLabelStore

Sample = tuple[Tensor, Tensor]


def make(shapes: list[tuple[int, ...]], classes: int = 5) -> list[Sample]:
    return [(torch.randint(classes, shape), torch.rand(shape)) for shape in shapes]


def fill(store: PseudoLabelStore, round: int, samples: list[Sample], ranks: int = 1, classes: int = 5) -> None:
    store.start(round)
    for rank in range(ranks):
        with store.write(round, classes, rank) as writer:
            for index in reversed(range(rank, len(samples), ranks)):
                writer.add(index, *samples[index])
    store.join(round)
    store.publish(round)


@pytest.mark.parametrize("shapes", [[(4, 5)] * 3, [(4, 5), (7, 2), (1, 1)], [(2, 3, 4), (5, 1, 2)]])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_round_trip(tmp_path: Path, shapes: list[tuple[int, ...]], ranks: int) -> None:
    samples = make(shapes)
    store = PseudoLabelStore(tmp_path, len(samples))
    fill(store, 0, samples, ranks)
    for index, (labels, weights) in enumerate(samples):
        read = store.read(index)
        assert torch.equal(read.labels, labels)
        assert (read.weights - weights).abs().max() <= 0.5 / 255 + 1e-7
        assert read.round == 0


def test_two_bytes_per_pixel(tmp_path: Path) -> None:
    fill(PseudoLabelStore(tmp_path, 10), 0, make([(32, 32)] * 10), ranks=2)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) == 10 * 32 * 32 * 2


@pytest.mark.parametrize("classes", [256, 257, 65535])
def test_many_classes(tmp_path: Path, classes: int) -> None:
    store = PseudoLabelStore(tmp_path, 1)
    labels = torch.tensor([[0, classes - 1]])
    fill(store, 0, [(labels, torch.ones(1, 2))], classes=classes)
    assert torch.equal(store.read(0).labels, labels)


def test_readers_follow_to_a_new_round(tmp_path: Path) -> None:
    store, first, second = PseudoLabelStore(tmp_path, 2), make([(3, 3)] * 2), make([(3, 3)] * 2)
    fill(store, 0, first)
    reader = PseudoLabelStore(tmp_path, 2)
    worker = pickle.loads(pickle.dumps(reader))
    assert torch.equal(reader.read(1).labels, first[1][0])
    fill(store, 1, second)
    for each in (reader, worker):
        assert torch.equal(each.read(1).labels, second[1][0])
        assert each.read(1).round == 1
    store.prune(keep={1})
    assert not store.has(0)
    assert torch.equal(reader.read(0).labels, second[0][0])


def test_incomplete_round_is_never_read(tmp_path: Path) -> None:
    store, samples = PseudoLabelStore(tmp_path, 2), make([(3, 3)] * 2)
    fill(store, 0, samples)
    store.start(1)
    with store.write(1, 5) as writer:
        writer.add(0, *samples[0])
    assert store.read(0).round == 0
    with pytest.raises(RuntimeError, match="one label for each of 2 samples in round 1, but got 1 for 1 samples"):
        store.join(1)
    assert store.read(0).round == 0
    fill(store, 1, samples)  # the incomplete round is replaced
    assert store.read(1).round == 1


def test_reading_before_the_first_round_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no round is there: train with `PseudoLabelCallback`"):
        PseudoLabelStore(tmp_path, 1).read(0)


@pytest.mark.parametrize("lost", ["", "current", "round-000000"])
def test_reading_deleted_labels_is_an_error(tmp_path: Path, lost: str) -> None:
    store = PseudoLabelStore(tmp_path / "labels", 2)
    fill(store, 0, make([(3, 3)] * 2))
    gone = tmp_path / "labels" / lost
    gone.unlink() if gone.is_file() else shutil.rmtree(gone)
    message = "deleted while it was on: resume it from its last|missing or damaged .*: resuming the run from its last"
    with pytest.raises(RuntimeError, match=message):
        PseudoLabelStore(tmp_path / "labels", 2).read(0)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    fill(PseudoLabelStore(tmp_path / "labels", 2), 0, make([(3, 3)] * 2))
    with pytest.raises(
        ValueError, match=r'length, {"length": 3}, but .*store.json says .{"length": 2}.: resume a run with'
    ):
        PseudoLabelStore(tmp_path / "labels", 3)
    thesis = tmp_path / "thesis" / "chapter.tex"
    thesis.parent.mkdir()
    thesis.write_text("all my work")
    with pytest.raises(ValueError, match="holds other files: name another folder"):
        PseudoLabelStore(thesis.parent, 2)
    assert thesis.read_text() == "all my work"


def test_bad_values_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PseudoLabelStore(tmp_path, 1)
    with pytest.raises(ValueError, match="at most 65535 classes, but got 65536"):
        store.write(0, 65536)
    store.start(0)
    with store.write(0, 5) as writer:
        for weights in (torch.full((2, 2), 1.5), torch.full((2, 2), torch.nan), torch.rand(2, 3)):
            with pytest.raises(ValueError, match=r"weights in \[0, 1\] for sample 0.*check the denoiser"):
                writer.add(0, torch.zeros(2, 2), weights)

        for labels in (torch.tensor([[300, 0]]), torch.tensor([[-1, 0]]), torch.full((5, 1, 2), 1.5)):
            with pytest.raises(ValueError, match=r"from 0 to 255, or soft labels in \[0, 1\], for sample 0, but got"):
                writer.add(0, labels, torch.ones(1, 2))
        writer.add(0, torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2))
        with pytest.raises(
            ValueError, match="to be soft, or none, but sample 1 has 5 classes of soft labels and those"
        ):
            writer.add(1, torch.rand(5, 2, 2), torch.ones(2, 2))
        writer._file.close()

        def full(_: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer, "_file", type("Full", (), {"write": staticmethod(full), "tell": int, "close": int}))
        with pytest.raises(OSError, match=r"No space left .*\(2 bytes per pixel\).*another `store_dir`"):
            writer.add(1, torch.zeros(2, 2), torch.ones(2, 2))
    assert np.load(tmp_path / "round-000000" / "rank-00000.npz")["sample"].tolist() == [0, 1]


def test_soft_labels_of_one_rank_are_an_error(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path, 2)
    store.start(0)
    for rank, labels in enumerate((torch.zeros(2, 2, dtype=torch.long), torch.rand(5, 2, 2))):
        with store.write(0, 5, rank) as writer:
            writer.add(rank, labels, torch.ones(2, 2))
    with pytest.raises(ValueError, match="labels of round 0 to be soft, or none, but those of the ranks differ"):
        store.join(0)


@pytest.mark.parametrize("harm", [zero, flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["rank-00001.bin", "index.npz"])
def test_damaged_files_are_found(tmp_path: Path, harm: Callable[[Path], None], name: str) -> None:
    store = PseudoLabelStore(tmp_path, 4)
    fill(store, 0, make([(8, 8)] * 4), ranks=2)
    assert store.damage(0) == ""
    store.read(3)
    harm(tmp_path / "round-000000" / name)
    assert f"{name} as it was written, but it is missing or damaged" in store.damage(0)
    fresh = PseudoLabelStore(tmp_path, 4)
    with pytest.raises(RuntimeError, match=f"{name} as it was written.*makes its pseudo labels anew"):
        [fresh.read(index) for index in range(4)]


def test_a_file_that_shrinks_while_it_is_read_is_found(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path, 1)
    fill(store, 0, make([(64, 64)]))
    store.read(0)
    (tmp_path / "round-000000" / "rank-00000.bin").write_bytes(b"")
    with pytest.raises(RuntimeError, match="rank-00000.bin as it was written.*the checksum of sample 0 differs"):
        store.read(0)


def test_ignored_pixels_keep_the_checksum(tmp_path: Path) -> None:
    store, samples = PseudoLabelStore(tmp_path, 2), make([(2, 2)] * 2)
    fill(store, 0, samples)
    store.reader(0).ignore({1: np.array([0, 3])})
    assert store.damage(0) == ""
    read = PseudoLabelStore(tmp_path, 2).read(1)
    assert torch.equal(read.labels, samples[1][0])
    assert read.weights.flatten()[[0, 3]].tolist() == [0, 0]
    assert (read.weights - samples[1][1]).flatten()[[1, 2]].abs().max() <= 0.5 / 255 + 1e-7


def test_another_node_may_start_the_same_store(tmp_path: Path) -> None:
    """Both create it on a shared disk; one has only begun to write its first file."""
    (tmp_path / ".0a1b2c3d.store.json").touch()
    fill(PseudoLabelStore(tmp_path, 1), 0, make([(2, 2)]))


def test_samples_without_ignored_pixels_are_not_touched(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path, 1)
    fill(store, 0, make([(2, 2)]))
    reader = store.reader(0)
    (tmp_path / "round-000000" / "rank-00000.bin").unlink()
    reader.ignore({0: np.array([], dtype=np.int64)})
    assert not (tmp_path / "round-000000" / "rank-00000.bin").exists()


@pytest.mark.parametrize("name", ["current", "store.json"])
def test_damaged_small_files_are_named(tmp_path: Path, name: str) -> None:
    store = PseudoLabelStore(tmp_path, 1)
    fill(store, 0, make([(2, 2)]))
    zero(tmp_path / name)
    with pytest.raises((RuntimeError, ValueError), match=f"{name} "):
        PseudoLabelStore(tmp_path, 1).read(0)


def test_classes_of_soft_labels(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path, 1)
    soft = torch.rand(3, 2, 5).softmax(0)
    with store.write(0, 3) as writer:
        writer.add(0, soft, torch.ones(2, 5))
    store.join(0)
    assert torch.equal(torch.from_numpy(store.reader(0).stored(0)[0].astype(int)), soft.argmax(0))

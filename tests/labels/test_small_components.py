"""Small components: all pixels of a class outside its largest component get weight 0."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Slices, TinyNet
from torch import Tensor

from apl_lightning import APLModule, PseudoLabelCallback, PseudoLabelStore, TargetDataModule
from apl_lightning.denoisers import APL, CBST, CRST
from apl_lightning.labels import SmallComponents, find_small_components

Make = Callable[..., pl.Trainer]


def find(
    folder: Path, labels: list[Tensor], weights: list[Tensor], cases: list[str], classes: int = 3, **options: Any
) -> SmallComponents:
    """Write a round as two ranks and search it for small components."""
    store = PseudoLabelStore(folder, len(labels))
    store.start(0)
    for rank in range(2):
        with store.write(0, classes, rank) as writer:
            for index in range(rank, len(labels), 2):
                writer.add(index, labels[index], weights[index], cases[index])
    store.join(0)
    return find_small_components(store.reader(0), classes, **options)


def rows(*text: str) -> Tensor:
    return torch.tensor([[int(digit) for digit in row] for row in text])


def test_single_pixel_outside_the_largest_component(tmp_path: Path) -> None:
    """Class 1 has components of four pixels and one pixel; class 2 has two halves and is exempt, as is background."""
    labels = rows("11020", "11020", "00001", "22000")
    found = find(tmp_path, [labels[None]], [torch.ones(1, 4, 5)], [""])
    assert {index: pixels.tolist() for index, pixels in found.pixels.items()} == {0: [14]}
    assert found.share == pytest.approx(1 / 9)


def test_class_without_a_large_component_is_exempt(tmp_path: Path) -> None:
    """A component with three quarters of the weight is large enough; one with two thirds is not."""
    enough = find(tmp_path / "enough", [rows("1110", "0001")[None]], [torch.ones(1, 2, 4)], [""])
    fewer = find(tmp_path / "fewer", [rows("1100", "0001")[None]], [torch.ones(1, 2, 4)], [""])
    assert enough.pixels[0].tolist() == [7]
    assert fewer.pixels[0].tolist() == []
    assert fewer.share == 0


def test_largest_component_share_is_over_all_volumes(tmp_path: Path) -> None:
    """A class in two halves in one volume still has most of its weight in the largest components."""
    halves, whole = rows("1010", "0000")[None], rows("1111", "1110")[None]
    found = find(tmp_path, [halves, whole], [torch.ones(1, 2, 4)] * 2, ["", ""])
    assert found.pixels[0].tolist() == [2]
    assert found.pixels[1].tolist() == []


def test_size_of_a_component_is_its_weight(tmp_path: Path) -> None:
    weights = torch.tensor([[[0.1, 0.1, 0.1, 0.0, 1.0]]])
    found = find(tmp_path, [rows("11101")[None]], [weights], [""])
    assert found.pixels[0].tolist() == [0, 1, 2]


def test_slices_of_a_case_are_one_volume(tmp_path: Path) -> None:
    """Slices of two patients alternate: a pixel may belong to a component through the next slice of its patient."""
    first = [rows("1110", "1110"), rows("0010", "0001")]
    second = [rows("0000", "0001"), rows("0001", "0111")]
    labels, cases = [first[0], second[0], first[1], second[1]], ["a", "b", "a", "b"]
    found = find(tmp_path, labels, [torch.ones(2, 4)] * 4, cases)
    assert {index: pixels.tolist() for index, pixels in found.pixels.items()} == {0: [], 1: [], 2: [7], 3: []}


def test_slices_without_a_case_are_exempt(tmp_path: Path) -> None:
    assert find(tmp_path, [rows("1110", "0001")], [torch.ones(2, 4)], [""]) == SmallComponents({}, 0.0)


def flood(mask: np.ndarray[Any, Any]) -> list[set[tuple[int, ...]]]:
    """Find connected components by flood fill."""
    left, found = {tuple(place) for place in np.argwhere(mask).tolist()}, []
    while left:
        piece, edge = set[tuple[int, ...]](), [left.pop()]
        while edge:
            place = edge.pop()
            piece.add(place)
            for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
                beside = (*place[:axis], place[axis] + step, *place[axis + 1 :])
                if beside in left:
                    left.remove(beside)
                    edge.append(beside)
        found.append(piece)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_equals_flood_fill(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    slices, weights = torch.randint(3, (6, 7, 8)), torch.rand(6, 7, 8)
    found = find(tmp_path, list(slices), list(weights), ["case"] * 6, largest_component_share=0.0)
    small = torch.zeros(6, 7, 8, dtype=torch.bool)
    for index, pixels in found.pixels.items():
        small[index].view(-1)[torch.from_numpy(pixels)] = True
    expected = torch.zeros_like(small)
    bytes_ = (255 * weights).round()
    for number in (1, 2):
        pieces = flood((slices == number).numpy())
        largest = max(pieces, key=lambda piece: sum(float(bytes_[place]) for place in piece))
        for place in itertools.chain(*(piece for piece in pieces if piece is not largest)):
            expected[place] = True
    assert torch.equal(small, expected)
    assert found.share == pytest.approx(float(bytes_[expected].sum() / bytes_[slices > 0].sum()))


def fit(folder: Path, trainer: Make, **options: Any) -> tuple[PseudoLabelStore, dict[str, float]]:
    data = TargetDataModule(Slices(10, "patient"), transform=None, store_dir=folder, case_key="patient")
    callback = PseudoLabelCallback(**options)
    trainer(max_steps=1, callbacks=[callback]).fit(APLModule(TinyNet(), CLASSES, batch_norm="adapt"), data)
    return data.train_dataset.store, callback.statistics


def test_only_apl_ignores_small_components_by_default() -> None:
    assert PseudoLabelCallback(APL(temperature=2.0)).ignore_small_components
    assert not PseudoLabelCallback(CBST()).ignore_small_components


@pytest.mark.parametrize("denoiser", [APL(), CRST(regulariser="lrent")], ids=["hard labels", "soft labels"])
def test_training_ignores_small_components(tmp_path: Path, trainer: Make, denoiser: Any) -> None:
    torch.manual_seed(0)
    ours, statistics = fit(
        tmp_path / "ours", trainer, denoiser=denoiser, ignore_small_components=True, largest_component_share=0.0
    )
    torch.manual_seed(0)
    plain, plain_statistics = fit(tmp_path / "plain", trainer, denoiser=denoiser, ignore_small_components=False)
    small = find_small_components(plain.reader(0), CLASSES, 0.0)
    assert statistics["pseudo/apart"] == pytest.approx(small.share)
    assert small.share > 0.01
    assert "pseudo/apart" not in plain_statistics
    for index in range(10):
        weights = plain.read(index).weights
        weights.view(-1)[torch.from_numpy(small.pixels[index])] = 0
        assert torch.equal(ours.read(index).weights, weights)
        assert torch.equal(ours.read(index).labels, plain.read(index).labels)


def test_slices_of_two_sizes(tmp_path: Path) -> None:
    store = PseudoLabelStore(tmp_path, 3)
    labels = [torch.tensor([[1, 1, 1, 0, 1]]), torch.tensor([[1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1]])]
    with store.write(0, 2) as writer:
        for index, label in enumerate(labels):
            writer.add(index, label, torch.ones(label.shape), "a")
    store.join(0)
    found = find_small_components(store.reader(0), 2, 0.0)
    # (1, 5) slices 0 and 2 are one volume: 3 pixels, and 2 that touch through the slices; slice 1 is another one
    assert {index: pixels.tolist() for index, pixels in found.pixels.items()} == {0: [4], 1: [], 2: [4]}

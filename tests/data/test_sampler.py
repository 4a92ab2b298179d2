"""Which samples are drawn, and in which pass."""

from __future__ import annotations

from apl_lightning.data import EpochSampler


def test_sample_that_fills_up_a_batch_is_marked() -> None:
    drawn = [each for rank in (0, 1) for each in EpochSampler(range(5), 2, rank, seed=0, done=lambda: 0)]
    assert len(drawn) == 6
    assert sorted(each.index for each in drawn if not each.repeated) == [0, 1, 2, 3, 4]


def test_each_pass_has_its_own_order() -> None:
    drawn = list(EpochSampler(range(20), 1, 0, seed=0, done=lambda: 0, samples=40))
    first, second = ([each.index for each in drawn if each.turn == turn] for turn in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_moves_differ_between_epochs() -> None:
    sampler = EpochSampler(range(4), 1, 0, seed=0, done=lambda: 0)
    sampler.set_epoch(3)
    assert {each.turn for each in sampler} == {3}

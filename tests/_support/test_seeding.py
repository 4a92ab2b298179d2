"""Seeds that depend on their purpose."""

from itertools import product

from apl_lightning._support.seeding import derived_seed


def test_numbers_that_differ_by_zeros_at_their_end_give_other_seeds() -> None:
    numbers = [each for count in (1, 2, 3) for each in product((0, 1, 2, 2**32 - 1), repeat=count)]

    assert len({derived_seed(*each) for each in numbers}) == len(numbers)

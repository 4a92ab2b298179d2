"""Seeds that depend on their purpose."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from monai.transforms import Compose, RandGaussianNoised

from apl_lightning._support.seeding import derived_seed, seeded

NOISE = Compose([RandGaussianNoised("image", prob=1.0)])


def test_numbers_that_differ_by_zeros_at_their_end_give_other_seeds() -> None:
    numbers = [each for count in (1, 2, 3) for each in product((0, 1, 2, 2**32 - 1), repeat=count)]

    assert len({derived_seed(*each) for each in numbers}) == len(numbers)


@pytest.mark.parametrize("kind", ["global", "closure", "partial", "attribute"])
def test_transforms_that_a_function_names_are_seeded(kind: str) -> None:
    noise = Compose([RandGaussianNoised("image", prob=1.0)])

    def within(sample: Any) -> Any:
        return noise(sample)

    class Holder:
        def __init__(self) -> None:
            self.noise = noise

        def __call__(self, sample: Any) -> Any:
            return self.noise(sample)

    functions: dict[str, Any] = {
        "global": lambda sample: NOISE(sample),
        "closure": within,
        "partial": partial(noise),
        "attribute": Holder(),
    }
    drawn = []
    for _ in range(2):
        with seeded(3, functions[kind]):
            drawn.append(functions[kind]({"image": torch.zeros(1, 4, 4)})["image"])
    assert torch.equal(*drawn)
    assert drawn[0].any()


def test_a_transform_seeds_its_own_parts() -> None:
    """MONAI's transforms pass seeds on to what they hold, each as it wants."""

    class Inner:
        seed = -1

        def set_random_state(self, seed: int) -> None:
            self.seed = seed

    class Outer:
        def __init__(self) -> None:
            self.inner = Inner()

        def set_random_state(self, seed: int) -> None:
            self.inner.set_random_state(seed + 1)

    transform = Outer()
    with seeded(3, transform):
        assert transform.inner.seed == 4

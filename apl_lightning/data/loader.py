"""The training loader: workers start late, and samples are stacked with the round of their labels."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, default_collate

from apl_lightning.data.joint_transforms import TARGET_KEYS
from apl_lightning.data.sampler import EpochSampler


class LazyDataLoader(DataLoader[Any]):
    """A loader that starts its workers with the first batch, not when its iterator is created.

    Lightning creates the iterator before `on_train_start`. Workers would then fetch samples with the labels of the
    previous round. The state-dict methods tell Lightning that the loader can be resumed within an epoch, as it can
    with an `EpochSampler`.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the trainer knows how many batches are done."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn of a sampler that cannot continue within an epoch."""
        if not isinstance(self.sampler, EpochSampler):
            warnings.warn(
                f"The samples of a resumed epoch come from {type(self.sampler).__name__}, which begins anew: some are "
                "read twice, others not at all. Pass the trainer the `TargetDataModule`, without "
                "`overfit_batches`, or use an `EpochSampler`.",
                stacklevel=2,
            )


def collate(samples: list[Any]) -> Any:
    """Stack samples; a list of samples (from a transform that draws several patches) is flattened first.

    `round` stays a list of integers: checking it does not synchronise with a GPU. Images of different sizes are a
    `ValueError`.
    """
    items = [item for sample in samples for item in (sample if isinstance(sample, list) else [sample])]
    _check_sizes(
        items, f"pass `patch_size`, batch_size=1, or a `transform` that crops or pads {', '.join(TARGET_KEYS)}"
    )
    rounds = [item["round"] for item in items]
    return {**default_collate([{key: item[key] for key in item if key != "round"} for item in items]), "round": rounds}


def collate_evaluated(samples: list[dict[str, Any]]) -> Any:
    """Stack samples for validation, test or prediction; images of different sizes are a `ValueError`."""
    _check_sizes(samples, "pass val_batch_size=1")
    return default_collate(samples)


def _check_sizes(samples: list[dict[str, Any]], cure: str) -> None:
    if len(shapes := {tuple(sample["image"].shape) for sample in samples}) > 1:
        raise ValueError(f"Expected images of one size in a batch, but got {sorted(shapes)}: {cure}.")

"""Validation, test and prediction with the main head of a network."""

from typing import Any, NamedTuple

from torch import Tensor

from apl_lightning._support.lightning import LightningModule
from apl_lightning.data import Keys, split_batch
from apl_lightning.heads import Inferer
from apl_lightning.metrics import CaseDice


class Prediction(NamedTuple):
    """What `trainer.predict` returns for a batch on request: labels (B, *S) and probabilities (B, C, *S)."""

    labels: Tensor
    probabilities: Tensor


class EvaluationSteps(LightningModule):
    """Logs the Dice of the main head, and predicts with it."""

    keys: Keys
    dice: CaseDice
    class_names: list[str]
    inferer: Inferer | None
    return_probabilities: bool

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Count the Dice of the main head on a labelled batch; `test_step` does the same."""
        image, label, cases = self._split(batch)
        if label is None:
            raise ValueError("Expected labels in the batches, but got none: pass `label_key`, or images with labels.")
        indices = batch["dataset_index"] if _is_own(batch) else None
        self.dice.update(self._infer(image).max(dim=1).indices, label, cases, indices)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor | Prediction:
        """Labels (B, *S) of the main head for a batch with or without labels; see `return_probabilities`."""
        image, _, _ = self._split(batch)
        logits = self._infer(image)
        labels = logits.max(dim=1).indices
        return Prediction(labels, logits.float().softmax(dim=1)) if self.return_probabilities else labels

    def on_validation_epoch_start(self) -> None:
        """Forget what an earlier validation has counted, also if it was interrupted."""
        self.dice.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log `val/dice/<class>` for each foreground class and their mean as `val/dice`."""
        self._log_dice("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/dice/<class>` for each foreground class and their mean as `test/dice`."""
        self._log_dice("test")

    def _split(self, batch: Any) -> tuple[Tensor, Tensor | None, list[str | None] | None]:
        """Image, label and cases of a batch; those of a `TargetDataModule` no longer have the project's keys."""
        return split_batch(batch, Keys() if _is_own(batch) else self.keys)

    def _infer(self, image: Tensor) -> Tensor:
        """Logits of the main head, (B, C, *S)."""
        main: Tensor = (self(image) if self.inferer is None else self.inferer(image, self))[0]
        return main

    def _log_dice(self, stage: str) -> None:
        # After DDP in the same script, a trainer on one device evaluates on one rank.
        dice = self.dice.compute(all_ranks=self.trainer.world_size > 1)
        dice = dice[1:].to(self.device)  # NCCL reduces no tensor of the CPU
        names = self.class_names[1:]
        values = {f"{stage}/dice/{name}": value for name, value in zip(names, dice, strict=True) if not value.isnan()}
        # The values are equal on all ranks; without `sync_dist` Lightning warns.
        self.log_dict(values, sync_dist=True)
        self.log(f"{stage}/dice", dice.nanmean(), prog_bar=True, sync_dist=True)


def _is_own(batch: Any) -> bool:
    """Whether a batch comes from a `TargetDataModule`."""
    return isinstance(batch, dict) and "dataset_index" in batch

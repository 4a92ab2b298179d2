"""Pictures of pseudo labels: to Weights & Biases, to TensorBoard, or to PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from apl_lightning._support.lightning import Callback, LightningModule, Trainer
from apl_lightning._support.lightning_package import is_a, require_lightning
from apl_lightning.labels import target_dataset

# The ten colours of Tableau; background stays transparent.
COLOURS = np.frombuffer(
    bytes.fromhex("1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 7f7f7f bcbd22 17becf"), dtype=np.uint8
).reshape(-1, 3)


def grey(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One slice of an image (C, *S) as RGB, (H, W, 3), scaled from its smallest to its largest value."""
    plane = _slice(image.float().mean(dim=0)).cpu()
    plane = (plane - plane.min()) / (plane.max() - plane.min()).clamp_min(1e-6)
    return _rgb(plane)


def overlay(image: Tensor, labels: Tensor, opacity: float = 0.5) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Labels (*S) in colours over an image (C, *S), as RGB (H, W, 3); of a volume, its middle slice.

    Examples:
        >>> import torch
        >>> from apl_lightning.visualize import overlay
        >>> overlay(torch.zeros(1, 1, 2), torch.tensor([[0, 1]]), opacity=1.0).tolist()
        [[[0, 0, 0], [31, 119, 180]]]
    """
    below = grey(image)
    plane = _slice(labels).cpu().numpy()
    coloured = below * (1 - opacity) + COLOURS[(plane - 1) % len(COLOURS)] * opacity
    return np.where(plane[..., None] > 0, coloured, below).astype(np.uint8)


class PseudoLabelOverlay(Callback):
    """Shows image, pseudo label, weights and, if there is one, the reference label of some samples each epoch.

    A `WandbLogger` gets image masks under `pseudo/overlays` and the weights under `pseudo/weights`, a
    `TensorBoardLogger` a row of pictures per sample. Without either, PNG files are written to `overlays` in the
    trainer's root directory.

    Args:
        samples: The number of samples, spread over the data set, or their indices.
        every_n_epochs: Show them after the first epoch, and each n-th one from there.

    Raises:
        ValueError: If `every_n_epochs` or the number of samples is below 1; at the start of a fit, if the data set has
            no sample of an index.
    """

    def __init__(self, samples: int | Sequence[int] = 4, every_n_epochs: int = 1) -> None:
        require_lightning(self)
        if every_n_epochs < 1:
            raise ValueError(f"Expected `every_n_epochs` to be at least 1, but got {every_n_epochs}.")
        if isinstance(samples, int) and samples < 1:
            raise ValueError(f"Expected at least 1 of `samples`, but got {samples}: pass a number, or their indices.")
        self.samples = samples
        self.every_n_epochs = every_n_epochs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse indices that the data set does not have."""
        length = len(target_dataset(trainer))
        if outside := [index for index in self._indices(length) if not 0 <= index < length]:
            raise ValueError(
                f"Expected `samples` between 0 and {length - 1}, the indices of the target images, but got {outside}."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the labels of this epoch."""
        if not trainer.is_global_zero or trainer.current_epoch % self.every_n_epochs:
            return
        dataset = target_dataset(trainer)
        class_names: Any = pl_module.class_names
        names = dict(enumerate(class_names))
        loggers: list[Any] = [logger for logger in trainer.loggers if is_a(logger, "WandbLogger", "TensorBoardLogger")]
        for index in self._indices(len(dataset)):
            label = dataset.store.read(index)
            sample = {**dataset.read(index), "labels": label.classes, "weights": label.weights}
            if "label" in sample and (ignored := getattr(pl_module, "ignore_index", None)) is not None:
                sample["label"] = sample["label"].masked_fill(sample["label"] == ignored, 0)
            for logger in loggers:
                if is_a(logger, "WandbLogger"):
                    _to_wandb(logger, index, sample, names, trainer.global_step)
                else:
                    row = _row(sample)
                    logger.experiment.add_image(f"pseudo/{index}", row, trainer.global_step, dataformats="HWC")
            if not loggers:
                folder = Path(trainer.default_root_dir) / "overlays" / f"epoch-{trainer.current_epoch:04d}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(_row(sample)).save(folder / f"sample-{index:06d}.png")

    def _indices(self, length: int) -> list[int]:
        if isinstance(self.samples, int):
            count = min(self.samples, length)
            return [(2 * position + 1) * length // (2 * count) for position in range(count)]
        return list(self.samples)


def _to_wandb(logger: Any, index: int, sample: dict[str, Any], names: dict[int, str], step: int) -> None:
    references = {"reference": sample["label"]} if "label" in sample else {}
    masks = {
        kind: {"mask_data": _slice(labels).cpu().numpy(), "class_labels": names}
        for kind, labels in {"prediction": sample["labels"], **references}.items()
    }
    logger.log_image(f"pseudo/overlays/{index}", [grey(sample["image"])], step=step, masks=[masks])
    logger.log_image(f"pseudo/weights/{index}", [_rgb(_slice(sample["weights"]))], step=step)


def _row(sample: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Image, pseudo label, weight and reference side by side."""
    image, labels, weights = sample["image"], sample["labels"], sample["weights"]
    tiles = [grey(image), overlay(image, labels), _rgb(_slice(weights))]
    if "label" in sample:
        tiles.append(overlay(image, sample["label"]))
    return np.concatenate(tiles, axis=1)


def _rgb(plane: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Values (H, W) in [0, 1] as shades of grey, (H, W, 3)."""
    shades: np.ndarray[Any, np.dtype[np.uint8]] = (plane * 255).byte().cpu().numpy()[..., None].repeat(3, axis=-1)
    return shades


def _slice(values: Tensor) -> Tensor:
    """The plane (H, W) of an image, or the middle one of a volume across its shortest axis, the last of equal ones."""
    while values.ndim > 2:
        axis = min(reversed(range(values.ndim)), key=lambda axis: values.shape[axis])
        values = values.select(axis, values.shape[axis] // 2)
    return values

"""Overlays in Weights & Biases (read from an offline run), TensorBoard and PNG files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from apl_lightning import APLModule, PseudoLabelCallback, PseudoLabelOverlay, TargetDataModule
from apl_lightning.visualize import COLOURS, grey, overlay

NAMES = ["background", "liver", "spleen"]


def fit(trainer: Callable[..., pl.Trainer], folder: Path, labelled: bool, **options: Any) -> None:
    data = TargetDataModule(
        Images(5, (16, 20), labelled), Images(2, (16, 20), True), batch_size=2, store_dir=folder / "labels"
    )
    callbacks = [PseudoLabelCallback(), PseudoLabelOverlay(samples=[1, 4])]
    trainer(callbacks=callbacks, max_epochs=2, log_every_n_steps=1, **options).fit(
        APLModule(TinyNet(), CLASSES, NAMES), data
    )


def records(path: Path) -> Iterator[Any]:
    """Read the records of an offline run: LevelDB log format after a header of 7 bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished(path: Path) -> list[Any]:
    """Read all records, waiting for the exit record: a process of wandb writes them asynchronously."""
    for _ in range(100):
        found = list(records(path))
        if any(record.HasField("exit") for record in found):
            break
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("shape", [(3, 6, 8), (6, 8, 3), (6, 3, 8)])
def test_a_volume_is_cut_across_its_shortest_axis(shape: tuple[int, int, int]) -> None:
    labels = torch.zeros(shape, dtype=torch.long)
    labels.select(shape.index(3), 1)[:] = 1
    assert overlay(torch.zeros(1, *shape), labels, 1.0).reshape(-1, 3).tolist() == [COLOURS[0].tolist()] * 48


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # from wandb
def test_wandb_offline_run(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(trainer, tmp_path, labelled=True, logger=logger)
    run = Path(logger.experiment.dir).parent
    logger.experiment.finish()

    history: dict[str, list[Any]] = {}
    (file,) = run.glob("*.wandb")
    for record in finished(file):
        for item in record.history.item:
            key = "/".join(item.nested_key) or item.key
            history.setdefault(key, []).append(json.loads(item.value_json))
    for key in ("train/loss", "train/consistency", "train/refinement", "val/dice", "val/dice/liver", "val/dice/spleen"):
        assert key in history, key
    for key in ("confidence", "agreement", "changed", "dice", "class_ratio/background", "class_ratio/spleen"):
        assert f"pseudo/{key}" in history, key
    assert all(0 <= value <= 1 for value in history["val/dice"])
    shown = [key for key in history if key.startswith("pseudo/overlays/")]
    assert any(key.startswith("pseudo/overlays/1") for key in shown)
    assert any(key.startswith("pseudo/overlays/4") for key in shown)
    assert any(key.startswith("pseudo/weights/1") for key in history)

    pictures = list((run / "files/media/images/pseudo/overlays").glob("*.png"))
    assert {Image.open(picture).size for picture in pictures} == {(20, 16)}
    masks = [np.array(Image.open(path)) for path in (run / "files/media/images/mask/pseudo/overlays").glob("*.png")]
    reference = Images(5, (16, 20), True).labels
    assert reference is not None
    assert any(np.array_equal(mask, reference[4].numpy()) for mask in masks), "one mask equals the reference"
    assert len(masks) == 2 * len(pictures), "prediction and reference"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the protobuf code of tensorboard
def test_tensorboard(tmp_path: Path, trainer: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(trainer, tmp_path, labelled=False, logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert {"pseudo/1", "pseudo/4"} <= set(events.Tags()["images"])
    assert {"val/dice", "pseudo/confidence"} <= set(events.Tags()["scalars"])
    assert events.Images("pseudo/1")[0].width == 3 * 20


@pytest.mark.parametrize("labelled", [False, True])
def test_png_files(tmp_path: Path, trainer: Any, labelled: bool) -> None:
    fit(trainer, tmp_path, labelled)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == [f"overlays/epoch-{e:04d}/sample-{s:06d}.png" for e in range(2) for s in (1, 4)]
    picture = np.array(Image.open(tmp_path / files[0]))
    assert picture.shape == (16, (4 if labelled else 3) * 20, 3)
    assert np.array_equal(picture[:, :20], grey(Images(5, (16, 20))[1]))


def test_number_of_epochs() -> None:
    with pytest.raises(ValueError, match="`every_n_epochs` to be at least 1, but got 0"):
        PseudoLabelOverlay(every_n_epochs=0)


def test_samples_that_are_not_there(tmp_path: Path, trainer: Any) -> None:
    with pytest.raises(ValueError, match="at least 1 of `samples`, but got 0"):
        PseudoLabelOverlay(0)
    run = trainer(callbacks=[PseudoLabelCallback(), PseudoLabelOverlay([4, 5])])
    with pytest.raises(ValueError, match=r"`samples` between 0 and 4, the indices of .* but got \[5\]"):
        run.fit(APLModule(TinyNet(), CLASSES), TargetDataModule(Images(5), store_dir=tmp_path))


def test_overlay_colours_only_labelled_pixels() -> None:
    image, labels = torch.rand(1, 6, 7), torch.randint(3, (6, 7))
    picture, below = overlay(image, labels, opacity=0.4), grey(image)
    for value in range(3):
        where = (labels == value).numpy()
        expected = below[where] if value == 0 else (0.6 * below[where] + 0.4 * COLOURS[value - 1]).astype(np.uint8)
        assert np.array_equal(picture[where], expected)


def test_volumes_are_shown_as_a_slice() -> None:
    image, labels = torch.rand(1, 7, 7, 7), torch.randint(3, (7, 7, 7))
    assert np.array_equal(overlay(image, labels), overlay(image[..., 3], labels[..., 3]))


def test_ignored_pixels_have_no_colour(tmp_path: Path, trainer: Any) -> None:
    class Ignored(Images):
        def __getitem__(self, index: int) -> Any:
            return self.images[index], torch.full((16, 16), 255)

    data = TargetDataModule(Ignored(4), batch_size=2, store_dir=tmp_path / "labels")
    callbacks = [PseudoLabelCallback(), PseudoLabelOverlay(samples=1)]
    trainer(callbacks=callbacks, default_root_dir=tmp_path).fit(APLModule(TinyNet(), CLASSES, ignore_index=255), data)
    (picture,) = tmp_path.glob("overlays/*/*.png")
    reference = np.asarray(Image.open(picture))[:, -16:]
    assert (reference == reference[..., :1]).all()

"""A resumed run needs the global batch size of the interrupted run, or it skips or repeats samples."""

from pathlib import Path
from typing import Any

import pytest
from conftest import CLASSES, Images, TinyNet

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule


def fit(folder: Path, trainer: Any, batch_size: int, resume: Path | None = None) -> None:
    data = TargetDataModule(Images(8), batch_size=batch_size, store_dir=folder / "labels")
    run = trainer(max_epochs=1 if resume is None else 2, callbacks=[PseudoLabelCallback()])
    run.fit(APLModule(TinyNet(), CLASSES), data, ckpt_path=resume, weights_only=False if resume else None)
    run.save_checkpoint(folder / "saved.ckpt")


def test_a_test_takes_another_batch_size(tmp_path: Path, trainer: Any) -> None:
    module = APLModule(TinyNet(), CLASSES)
    data = TargetDataModule(Images(8), test=Images(4, labelled=True), batch_size=2, store_dir=tmp_path)
    run = trainer(callbacks=[PseudoLabelCallback()])
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    data.batch_size = 4
    (scores,) = trainer(callbacks=[PseudoLabelCallback()]).test(
        module, data, ckpt_path=tmp_path / "saved.ckpt", weights_only=False
    )
    assert "test/dice" in scores


def test_another_batch_size_is_refused(tmp_path: Path, trainer: Any) -> None:
    fit(tmp_path, trainer, batch_size=2)
    with pytest.raises(ValueError, match="batch size of the interrupted run, 2 over all processes, but got 4: change"):
        fit(tmp_path, trainer, batch_size=4, resume=tmp_path / "saved.ckpt")
    fit(tmp_path, trainer, batch_size=2, resume=tmp_path / "saved.ckpt")

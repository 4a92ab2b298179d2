"""Two processes give the same labels, weights and metrics as one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, Slices, TinyNet
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from apl_lightning import (
    APLModule,
    PseudoLabelCallback,
    PseudoLabelStore,
    SelfTrainingModule,
    TargetDataModule,
    TentModule,
)
from apl_lightning.denoisers import BDL, CBST, CRST, DPL, IAST, UPL, Chebyshev, MRNet

Make = Callable[..., pl.Trainer]


class Record(pl.Callback):
    """Saves the final weights, metrics and statistics of each rank for the parent process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[dict[str, Tensor]] = []  # the state that made the labels of each epoch

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.started.append(copy.deepcopy(module.state_dict()))

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.stepped = copy.deepcopy(module.state_dict())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        torch.save(
            {
                "state": module.state_dict(),
                "started": self.started,
                "stepped": self.stepped,
                "metrics": metrics,
                "statistics": trainer.callbacks[0].statistics,
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def run(folder: Path, trainer: Make, devices: int, samples: int, epochs: int = 1, **options: Any) -> list[Any]:
    """Fit on `devices` processes with a global batch of 4; return the records of all ranks."""
    folder.mkdir()
    torch.manual_seed(0)
    kind, more = options.pop("kind", APLModule), options.pop("module", {})
    if kind is APLModule:
        more = {"weighting": "none", **more}
    module = kind(TinyNet(), CLASSES, optimizer=torch.optim.SGD, learning_rate=0.1, **more)
    data = TargetDataModule(
        options.pop("train", None) or Images(samples, labelled=True),
        options.pop("val", None) or Images(5, labelled=True),
        batch_size=4 // devices,
        transform=None,
        store_dir=folder / "labels",
    )
    strategy = {} if devices == 1 else {"devices": devices, "strategy": "ddp_fork"}
    callbacks = [PseudoLabelCallback(options.pop("denoiser", None), **options.pop("callback", {})), Record(folder)]
    trainer(max_epochs=epochs, callbacks=callbacks, num_sanity_val_steps=0, **strategy, **options).fit(module, data)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


def labels(folder: Path) -> bytes:
    """All labels and weights in the order of their index, read from the store."""
    (directory,) = (folder / "labels").iterdir()
    length = json.loads((directory / "store.json").read_text())["length"]
    store = PseudoLabelStore(directory, length)
    return b"".join(
        torch.cat([store.read(i).labels.float().flatten(), store.read(i).weights.flatten()]).numpy().tobytes()
        for i in range(length)
    )


@pytest.mark.parametrize(("samples", "batch_norm"), [(64, "adapt"), (37, "adapt"), (1, "adapt"), (37, "auto")])
def test_labels_are_those_of_one_process(tmp_path: Path, trainer: Make, samples: int, batch_norm: str) -> None:
    """Even shares, uneven shares, and a rank without samples; and a choice of BatchNorm statistics."""
    module = {"batch_norm": batch_norm}
    (one,) = run(tmp_path / "one", trainer, 1, samples, max_steps=1, module=module)
    two = run(tmp_path / "two", trainer, 2, samples, max_steps=1, module=module)
    assert labels(tmp_path / "one") == labels(tmp_path / "two")
    for rank in two:
        assert rank["statistics"] == pytest.approx(one["statistics"])


@pytest.mark.parametrize(
    "denoiser",
    [BDL(), CBST(), CRST(regulariser="lrent"), IAST(), DPL(passes=3), UPL(), Chebyshev(passes=3), MRNet()],
    ids=lambda denoiser: type(denoiser).__name__,
)
def test_labels_of_every_method_are_those_of_one_process(tmp_path: Path, trainer: Make, denoiser: Any) -> None:
    """Statistics are reduced over ranks, and dropout does not depend on the number of processes."""
    for folder, devices in (("one", 1), ("two", 2)):
        run(tmp_path / folder, trainer, devices, 37, max_steps=1, denoiser=copy.deepcopy(denoiser))
    assert labels(tmp_path / "one") == labels(tmp_path / "two")


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_small_components_are_those_of_one_process(tmp_path: Path, trainer: Make, share: float) -> None:
    """Small components are treated in every class, or in those that are nearly one piece."""
    options = {"max_steps": 1, "train": Slices(9), "callback": {"largest_component_share": share}}
    options["module"] = {"batch_norm": "adapt"}
    found = [run(tmp_path / str(devices), trainer, devices, 9, **options) for devices in (1, 2)]
    assert labels(tmp_path / "1") == labels(tmp_path / "2")
    parts = [rank["statistics"]["pseudo/apart"] for ranks in found for rank in ranks]
    assert parts[0] > 0.01
    assert parts == [parts[0]] * 3


def test_step_on_the_same_global_batch(tmp_path: Path, trainer: Make) -> None:
    """Pixel weights differ between ranks, but the gradient is that of the weighted mean over the global batch."""
    (one,) = run(tmp_path / "one", trainer, 1, 4)
    two = run(tmp_path / "two", trainer, 2, 4)
    for rank in two:
        for name, value in one["state"].items():
            torch.testing.assert_close(rank["state"][name], value, atol=1e-6, rtol=1e-5, msg=name)
        assert rank["metrics"]["val/dice"] == pytest.approx(one["metrics"]["val/dice"], abs=1e-9)
        for name in ("train/loss", "train/consistency", "train/refinement"):
            assert rank["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5), name


@pytest.mark.parametrize("weighting", ["none", "confusion"])
def test_weights_with_uneven_shares(tmp_path: Path, trainer: Make, weighting: str) -> None:
    """Seven samples in global batches of four: the sample that fills up the last batch does not count."""
    module = {"weighting": weighting, "consistency_weight": 10.0, "head_rate": 1.0}
    (one,) = run(tmp_path / "one", trainer, 1, 7, epochs=3, module=module)
    two = run(tmp_path / "two", trainer, 2, 7, epochs=3, module=module)
    for rank in two:
        for name, value in one["state"].items():
            torch.testing.assert_close(rank["state"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["adapt", "frozen"])
def test_synchronised_batch_norm(tmp_path: Path, trainer: Make, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank re-estimates the statistics on all images and then freezes them, so nothing is synchronised.

    DDP refuses SyncBatchNorm on CPUs; the test disables only this check.
    """
    monkeypatch.setattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda self, module: None)
    options = {"module": {"batch_norm": mode}, "epochs": 2}
    (one,) = run(tmp_path / "one", trainer, 1, 8, **options)
    two = run(tmp_path / "two", trainer, 2, 8, sync_batchnorm=True, **options)
    assert labels(tmp_path / "one") == labels(tmp_path / "two")
    for name, value in one["state"].items():
        torch.testing.assert_close(two[1]["state"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("kind", "module"),
    [(SelfTrainingModule, {}), (TentModule, {}), (APLModule, {"consistency_weight": 0.0, "aux": "encoder.2"})],
)
def test_every_trained_parameter_has_a_gradient(tmp_path: Path, trainer: Make, kind: Any, module: Any) -> None:
    """DDP waits for the gradient of each parameter that requires one."""
    first, second = run(tmp_path / "two", trainer, 2, 8, epochs=2, kind=kind, module=module)
    for name, value in first["state"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, second["state"][name]), name


class LabelledSlices(Images):
    """Dictionaries of image, label and case: the slices of two patients in alternating order."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "case": index % 2}


def test_validation_counts_padded_samples_once(tmp_path: Path, trainer: Make) -> None:
    """Five slices on two ranks: the sampler repeats one of them, which would change the Dice of its patient."""
    (one,) = run(tmp_path / "one", trainer, 1, 4, val=LabelledSlices(5, labelled=True))
    two = run(tmp_path / "two", trainer, 2, 4, val=LabelledSlices(5, labelled=True))
    for rank in two:
        for name in ("val/dice", "val/dice/1", "val/dice/2"):
            assert rank["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-6)


def test_batch_norm_that_differs_between_ranks(tmp_path: Path, trainer: Make) -> None:
    """In training mode the running statistics differ between ranks; labels use those of rank 0."""
    options = {"module": {"batch_norm": "train"}, "limit_val_batches": 0}  # validation would synchronise them
    first, second = run(tmp_path / "two", trainer, 2, 8, epochs=2, **options)
    name = "model.network.encoder.1.running_mean"
    assert not torch.equal(first["stepped"][name], second["stepped"][name])
    for mine, other in zip(first["started"], second["started"], strict=True):
        assert torch.equal(mine[name], other[name]), "both ranks make labels with the statistics of rank 0"


class CorruptOnOneRank(Images):
    """Sample 2, in the share of rank 1, becomes invalid after the start of the run."""

    reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += index == 2
        image, label = super().__getitem__(index)
        return image / (0 if index == 2 and self.reads > 2 else 1), label


def test_error_on_one_rank_is_raised_on_all(tmp_path: Path, trainer: Make) -> None:
    data = CorruptOnOneRank(4, labelled=True)
    with pytest.raises(Exception, match=r"failed on ranks \[\d.*\]: .*sample 2"):
        run(tmp_path / "two", trainer, 2, 4, train=data)

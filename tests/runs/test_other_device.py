"""On another device than the CPU no tensor is left behind: everything runs, and gives what it gives on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from other_device import DEVICE, OnDevice, on_device, other_device
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from apl_lightning import (
    APLModule,
    PseudoLabelCallback,
    PseudoLabelOverlay,
    SelfTrainingModule,
    TargetDataModule,
    TentModule,
)
from apl_lightning.denoisers import (
    APL,
    BDL,
    CBST,
    CRST,
    DPL,
    IAST,
    UPL,
    Chebyshev,
    Denoiser,
    MRNet,
    Predictor,
    Threshold,
    denoise,
)
from apl_lightning.guard.pixel_features import pixel_features
from apl_lightning.metrics import CaseDice
from apl_lightning.nnunet.windows import Windows
from apl_lightning.preflight import preflight

Make = Callable[..., pl.Trainer]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    autocast = torch.autocast  # knows the devices that torch has
    monkeypatch.setattr(torch, "autocast", lambda device, **options: autocast("cpu", **options))
    log = pl.LightningModule.log

    def checked(module: Any, name: str, value: Any, **options: Any) -> None:
        assert not isinstance(value, Tensor) or value.device == module.device, f"NCCL does not reduce {name}"
        log(module, name, value, **options)

    monkeypatch.setattr(pl.LightningModule, "log", checked)
    with other_device():
        yield


class Labelled(Images):
    """Dictionaries of image, label and case."""

    def __init__(self) -> None:
        super().__init__(4, labelled=True)

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "case": index // 2}


def fit(trainer: Make, folder: Path, module: Any, callback: Any, other: bool) -> Any:
    """Fit, resume for an epoch, test and predict; return the module, its labels and its metrics."""
    torch.manual_seed(0)
    where = on_device() if other else {}
    given = {name: Labelled() for name in ("val", "test", "predict")}
    data = TargetDataModule(Labelled(), **given, batch_size=2, transform=None, store_dir=folder / "labels")
    for epochs in (1, 2):
        callbacks = [callback(), PseudoLabelOverlay(), ModelCheckpoint(folder, "last")]
        run = trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            **{"enable_checkpointing": True, **where},
        )
        made = module()
        run.fit(made, data, ckpt_path=folder / "last.ckpt" if epochs == 2 else None, weights_only=True)
    dice = run.test(made, data, verbose=False)
    labels = torch.cat(run.predict(made, data)).cpu()
    return made, labels, dice[0] | {name: float(value) for name, value in run.callbacks[0].statistics.items()}


@pytest.mark.parametrize(
    ("module", "callback"),
    [
        (lambda: APLModule(TinyNet(), CLASSES, aux="fresh", example=torch.rand(2, 1, 8, 8)), PseudoLabelCallback),
        (
            lambda: SelfTrainingModule(TinyNet(), CLASSES, batch_norm="train"),
            lambda: PseudoLabelCallback(DPL(), ignore_small_components=True, guard="warn"),
        ),
        (lambda: TentModule(TinyNet(), CLASSES), lambda: PseudoLabelCallback(guard="off")),
    ],
    ids=["APL", "self-training", "Tent"],
)
def test_a_run_equals_that_on_the_cpu(module: Any, callback: Any, tmp_path: Path, trainer: Make) -> None:
    ours = fit(trainer, tmp_path / "ours", module, callback, other=True)
    theirs = fit(trainer, tmp_path / "theirs", module, callback, other=False)
    networks = [made.export().state_dict() for made, _, _ in (ours, theirs)]
    for name, values in networks[0].items():
        assert torch.equal(values.cpu(), networks[1][name]), name
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]


def test_patches_of_volumes(tmp_path: Path, trainer: Make) -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, CLASSES, 1))
    module = APLModule(network, CLASSES)
    volumes = [torch.rand(1, 10, 12, 9), torch.rand(1, 9, 9, 9)]
    data = TargetDataModule(volumes, patch_size=(8, 8, 8), batch_size=1, transform=None, store_dir=tmp_path / "labels")
    trainer(**on_device(), callbacks=[PseudoLabelCallback()]).fit(module, data)


@pytest.mark.parametrize(
    "denoiser",
    [APL(), APL(temperature=2.0), BDL(), CBST(), CRST(), CRST(regulariser="lrent"), DPL(), IAST(), UPL(), Chebyshev(),
     MRNet(), Threshold()],
    ids=repr,
)  # fmt: skip
def test_denoisers(denoiser: Denoiser) -> None:
    images = torch.rand(4, 1, 16, 16)
    network = nn.Sequential(TinyNet().encoder, nn.Dropout2d(), nn.Conv2d(6, CLASSES, 1))
    network[-1].weight.data *= 100  # sure of all classes
    module = APLModule(network, CLASSES).eval()

    def made() -> list[Tensor]:
        torch.manual_seed(0)
        here = next(module.parameters()).device
        predictions = [denoiser.predict(Predictor(module), batch.to(here)) for batch in images.split(2)]
        with torch.no_grad():
            return [tensor for batch in denoise(denoiser, predictions) for tensor in batch]

    expected = made()
    module.to(DEVICE)
    found = made()
    assert all(isinstance(tensor, OnDevice) for tensor in found)
    assert all(torch.equal(tensor.cpu(), other) for tensor, other in zip(found, expected, strict=True))


def test_windows_of_nnunet() -> None:
    module, images = APLModule(TinyNet(), CLASSES).eval(), torch.rand(1, 1, 20, 28)
    expected = Windows((16, 16), (0, 1))(images, module)
    found = Windows((16, 16), (0, 1))(images.to(DEVICE), module.to(DEVICE))
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("denoiser", [APL(), BDL(), CBST(), CRST(), IAST(), UPL(), Chebyshev(), MRNet()], ids=repr)
def test_an_inferer_may_put_predictions_together_on_the_cpu(denoiser: Denoiser, tmp_path: Path, trainer: Make) -> None:
    def inferer(images: Tensor, network: Callable[..., Any]) -> Any:
        return type(made := network(images))(*(logits.cpu() for logits in made))

    module = APLModule(TinyNet(), CLASSES)
    data = TargetDataModule(Labelled(), batch_size=2, transform=None, store_dir=tmp_path / "labels")
    trainer(**on_device(), callbacks=[PseudoLabelCallback(denoiser, inferer=inferer)]).fit(module, data)


def test_dice_of_predictions_on_the_cpu() -> None:
    predictions, labels = torch.randint(CLASSES, (2, 1, 8, 8))
    dice = CaseDice(CLASSES)
    dice.update(predictions, labels.to(DEVICE))
    expected = CaseDice(CLASSES)
    expected.update(predictions, labels)
    assert torch.equal(dice.compute(), expected.compute())


def test_guard_takes_any_precision_of_convolutions() -> None:
    images, places = torch.rand(2, 1, 8, 8), torch.arange(10).expand(2, 10)
    expected, convolutions = pixel_features(images, places), torch.backends.cudnn.conv
    before, enabled = convolutions.fp32_precision, torch.backends.cudnn.enabled
    convolutions.fp32_precision = "ieee"
    try:
        assert torch.equal(pixel_features(images, places), expected)
    finally:
        convolutions.fp32_precision = before
    assert torch.backends.cudnn.enabled == enabled


def test_preflight() -> None:
    network, images = TinyNet(), Images(8)
    expected = preflight(network, images)
    found = preflight(network.to(DEVICE), images)
    assert [trial.gains for trial in found.trials] == [trial.gains for trial in expected.trials]
    assert found.skipped == expected.skipped


def test_tensors_of_two_devices_do_not_meet() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=DEVICE) + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        TinyNet().to(DEVICE)(torch.ones(1, 1, 8, 8))

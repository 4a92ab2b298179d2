"""Label-free scores compared with naive implementations; warnings of a collapse; restored rounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from damage import zero
from torch import Tensor, nn

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.denoisers import UPL
from apl_lightning.guard import Guard, UnsupervisedScores

Make = Callable[..., pl.Trainer]
FIRST = {
    "pseudo/class_ratio/0": 0.9,
    "pseudo/class_ratio/liver": 0.1,
    "pseudo/agreement": 0.99,
    "pseudo/im": 0.5,
    "pseudo/snd": 5.0,
}


def naive_scores(batches: list[Tensor]) -> dict[str, float]:
    """Information maximisation and soft neighbourhood density for images so small that all pixels are used."""
    pixels = [
        p[:, n].tolist() for batch in batches for image in batch for p in [image.flatten(1)] for n in range(p.shape[1])
    ]
    mean = [sum(pixel[c] for pixel in pixels) / len(pixels) for c in range(len(pixels[0]))]
    entropy = sum(-sum(v * math.log(v) for v in pixel) for pixel in pixels) / len(pixels)
    densities = []
    for image in (image.flatten(1).T for batch in batches for image in batch):
        for i, pixel in enumerate(image):
            others = torch.stack([other for j, other in enumerate(image) if j != i])
            cosines = (others @ pixel) / (others.norm(dim=1) * pixel.norm())
            s = (cosines / 0.05).softmax(0)
            densities.append(-float((s * s.log()).sum()))
    im = -sum(v * math.log(v) for v in mean) - entropy
    return {"pseudo/im": im, "pseudo/snd": sum(densities) / len(densities)}


def test_scores() -> None:
    names = ["background", "liver", "spleen"]
    batches = [(torch.randn(2, 3, 5, 4).softmax(1), torch.randn(2, 3, 5, 4).softmax(1)) for _ in range(2)]
    scores = UnsupervisedScores(names)
    for p_main, p_aux in batches:
        scores.update(p_main, p_aux)
    merged = [(p_main + p_aux) / 2 for p_main, p_aux in batches]
    expected = naive_scores(merged)
    agreeing = [float(a == b) for pair in batches for a, b in zip(*(p.argmax(1).flatten() for p in pair), strict=True)]
    expected["pseudo/agreement"] = sum(agreeing) / len(agreeing)
    labels = [int(label) for p in merged for label in p.argmax(1).flatten()]
    expected |= {f"pseudo/class_ratio/{name}": labels.count(c) / len(labels) for c, name in enumerate(names)}
    assert scores.compute(torch.device("cpu")) == pytest.approx(expected, rel=1e-4)


def test_scores_sample_large_images() -> None:
    """In rows of 64 pixels, an even step would always sample the same columns."""
    image = torch.zeros(1, 2, 64, 64)
    image[:, 0, :, ::2] = image[:, 1, :, 1::2] = 1
    scores = UnsupervisedScores(["0", "1"])
    scores.update(image, image)
    assert scores.compute(torch.device("cpu"))["pseudo/im"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pseudo/class_ratio/liver": 0.02}, "'liver' is 2.00 % of all pixels, 0.20 times the 10.00 %"),
        (
            {"pseudo/class_ratio/liver": 0.3, "pseudo/class_ratio/0": 0.7},
            "'liver' is 30.00 % of all pixels, 3.00 times",
        ),
        ({"pseudo/agreement": 0.9}, "the heads agree on 0.900"),
        ({"pseudo/im": 0.48}, "information maximisation is 0.480, 0.96 times the 0.500"),
        ({"pseudo/im": 0.49}, None),
        ({"pseudo/class_ratio/liver": 0.12, "pseudo/class_ratio/0": 0.88}, None),
    ],
)
def test_complaints(change: dict[str, float], named: str | None) -> None:
    guard = Guard("warn")
    guard.start(FIRST)
    assert guard.complaints(FIRST) == []
    complaints = guard.complaints({**FIRST, **change})
    assert len(complaints) == (named is not None)
    assert named is None or complaints[0].startswith(named)
    assert Guard("off").complaints({}) == []


def test_doubts() -> None:
    guard = Guard("restore")
    guard.start(FIRST)
    assert guard.complaints(FIRST) == guard.doubts(FIRST) == []
    assert guard.doubts({**FIRST, "pseudo/snd": FIRST["pseudo/snd"] + 0.03}) == []
    (doubt,) = guard.doubts({**FIRST, "pseudo/snd": FIRST["pseudo/snd"] + 0.01})
    assert doubt.endswith("no sign of a gain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "on"}, "`guard` to be one of .*'restore'.* but got 'on'"),
        ({"mode": "warn", "drift": 1.0}, "`drift` > 1.*drift=1.0"),
        ({"mode": "warn", "fade": 1.0}, "`fade` between 0 and 1.*fade=1.0"),
        ({"mode": "warn", "agreement": 0}, "`agreement` > 0.*agreement=0"),
    ],
)
def test_bad_options_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guard(**options)


class Scripted(Guard):
    """Takes the health of each round from a list; its last value is for the network after the last epoch."""

    healthy: list[int]

    def complaints(self, scores: Any) -> list[str]:
        return [] if self.healthy.pop(0) else ["scripted complaint"]

    def doubts(self, scores: Any) -> list[str]:
        return []


def scripted(*healthy: int) -> PseudoLabelCallback:
    callback = PseudoLabelCallback(guard="restore")
    callback.guard = Scripted("restore")
    callback.guard.healthy = list(healthy)
    return callback


class Weights(pl.Callback):
    """Records the weights that made each round."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.states.append({name: value.clone() for name, value in module.model.state_dict().items()})


def fit(folder: Path, trainer: Make, callback: PseudoLabelCallback, epochs: int = 3, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module, weights = APLModule(TinyNet(), CLASSES, learning_rate=options.pop("learning_rate", 0.05)), Weights()
    data = TargetDataModule(Images(6), store_dir=folder / "labels")
    run = trainer(max_epochs=epochs, callbacks=[callback, weights, *options.pop("callbacks", [])], **options)
    run.fit(module, data, ckpt_path=options.pop("ckpt_path", None))
    return module, weights.states


class Fade(pl.Callback):
    """Shifts the classifiers towards class 0 at the start of given rounds."""

    def __init__(self, *epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch + 1 in self.epochs:
            for part in (module.model, module.teacher.module):
                for classifier in (part.network.classifier, part.second):
                    classifier.bias.data[0] += 100


def test_collapse_is_a_warning(tmp_path: Path, trainer: Make) -> None:
    with pytest.warns(
        UserWarning, match=r"round 1 a collapse may have begun: '1' is 0.00 % of all pixels, 0.00 times the 15.23 %"
    ):
        fit(tmp_path, trainer, PseudoLabelCallback(), epochs=2, callbacks=[Fade(1)])


@pytest.mark.parametrize("denoiser", [None, lambda p, q: (p.argmax(1) * 0, torch.ones_like(p[:, 0])), UPL()])
def test_restore_after_a_collapse_but_not_without_one(tmp_path: Path, trainer: Make, denoiser: Any) -> None:
    """The real guard compares scores of the same kind of predictions, for each denoiser."""
    callback = PseudoLabelCallback(denoiser, guard="restore")
    with pytest.warns(UserWarning, match="network of round 0 is restored. After the last epoch .*'1' is 0.00 %"):
        module, states = fit(tmp_path / "fading", trainer, callback, epochs=2, callbacks=[Fade(2)])
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, states[0][name]), name
    unchanged = PseudoLabelCallback(denoiser, guard="restore")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="In round .* a collapse may have begun")
        warnings.filterwarnings("error", message="guard='restore': .* After the last epoch '")
        warnings.filterwarnings("ignore", message="guard='restore': .* no sign of a gain")
        fit(tmp_path / "unchanged", trainer, unchanged, epochs=2, learning_rate=0.0)
    assert unchanged.guard.complaints(unchanged.scores) == []
    assert unchanged.scores == unchanged.guard.first, "an unchanged network has unchanged scores"


def test_measured_scores_are_those_in_evaluation_mode(tmp_path: Path, trainer: Make) -> None:
    class WithDropout(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.append(nn.Dropout(0.5))

    class Measure(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            measured.append(labels.measure(trainer, module))
            assert module.model.network.encoder[4].training

    measured: list[dict[str, float]] = []
    labels = PseudoLabelCallback()
    module = APLModule(WithDropout(), CLASSES, learning_rate=0.0, ema_decay=None)
    trainer(callbacks=[labels, Measure()]).fit(module, TargetDataModule(Images(4), batch_size=2, store_dir=tmp_path))
    assert measured == [pytest.approx(labels.scores)] * 2


@pytest.mark.parametrize(("healthy", "last"), [((1, 1, 0, 0), 1), ((1, 0, 0, 0), 0), ((1, 0, 1, 0), 2)])
def test_restore(tmp_path: Path, trainer: Make, healthy: tuple[int, ...], last: int) -> None:
    with pytest.warns(
        UserWarning, match=f"network of round {last} is restored. After the last epoch scripted complaint"
    ):
        module, states = fit(tmp_path, trainer, scripted(*healthy))
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, states[last][name]), name
    (folder,) = (tmp_path / "labels").iterdir()
    assert [path.name for path in folder.glob("healthy*")] == [f"healthy-{last:06d}.pt"]


@pytest.mark.parametrize("healthy", [(1, 1, 1, 1), (1, 0, 0, 1)])
def test_healthy_last_network_is_kept(tmp_path: Path, trainer: Make, healthy: tuple[int, ...]) -> None:
    module, states = fit(tmp_path, trainer, scripted(*healthy))
    weight = module.model.network.classifier.weight
    assert all(not torch.equal(weight, state["network.classifier.weight"]) for state in states)


@pytest.mark.parametrize("harm", [Path.unlink, zero])
def test_lost_snapshot_keeps_the_last_network(tmp_path: Path, trainer: Make, harm: Callable[[Path], None]) -> None:
    class Lose(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            for path in (tmp_path / "labels").rglob("healthy-*"):
                harm(path)

    with pytest.warns(UserWarning, match="was healthy, but its file is missing or damaged in .*: the last epoch stays"):
        module, states = fit(tmp_path, trainer, scripted(1, 1, 0, 0), callbacks=[Lose()])
    weight = module.model.network.classifier.weight
    assert all(not torch.equal(weight, state["network.classifier.weight"]) for state in states)


def test_resumed_run_restores_the_same_round(tmp_path: Path, trainer: Make) -> None:
    """The first run has another healthy round after the checkpoint; the resumed run ignores its file."""
    saved = tmp_path / "saved.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(saved)

    _, states = fit(tmp_path, trainer, scripted(1, 0, 1, 1), callbacks=[Save()])
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.05)
    data = TargetDataModule(Images(6), store_dir=tmp_path / "labels")
    with pytest.warns(UserWarning, match="network of round 0 is restored"):
        trainer(max_epochs=3, callbacks=[scripted(0, 0, 0)]).fit(module, data, ckpt_path=saved, weights_only=False)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, states[0][name]), name

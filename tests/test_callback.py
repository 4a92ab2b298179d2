"""Rounds of pseudo labels: schedule, resume, statistics, messages, and no batch with labels of another round."""

from __future__ import annotations

import copy
import csv
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from torch import Tensor
from torch.utils.data import DataLoader

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule, TargetDataset
from apl_lightning.data import collate
from apl_lightning.denoisers import APL
from apl_lightning.labels import target_dataset

Make = Callable[..., pl.Trainer]


class RoundAsLabel:
    """A slow denoiser that writes the number of the round as the label."""

    def __init__(self, batches: int, delay: float = 0.0) -> None:
        self.calls, self.batches, self.delay = 0, batches, delay

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.delay)
        round = self.calls // self.batches
        self.calls += 1
        shape = p_main.shape[:1] + p_main.shape[2:]
        return torch.full(shape, round % CLASSES), torch.ones(shape)


class Witness(pl.Callback):
    """Records for each sample the epoch, the round in the batch and the pseudo label."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.stop_at:
            raise KeyboardInterrupt
        for round, label in zip(batch["round"], batch["pseudo_label"], strict=True):
            assert label.unique().numel() == 1
            self.seen.append((trainer.current_epoch, int(round), int(label.flatten()[0])))


@pytest.fixture
def run(tmp_path: Path, trainer: Make) -> Callable[..., Any]:
    """Fit three epochs of four batches; return what `Witness` recorded, and the trainer."""

    def fit(
        workers: int = 0,
        resume: Path | None = None,
        stop_at: int | None = None,
        persistent: bool = True,
        **options: Any,
    ) -> Any:
        denoiser = RoundAsLabel(batches=4, delay=0.02 if workers else 0)
        callback = PseudoLabelCallback(denoiser, options.pop("every_n_epochs", 1), batch_size=2)
        witness = Witness(stop_at)
        # A resumed denoiser continues to count from the round of the checkpoint.
        if resume is not None:
            state = torch.load(resume, weights_only=True)["callbacks"]["PseudoLabelCallback"]
            denoiser.calls = 4 * (state["round"] + 1)
        data = TargetDataModule(Images(8), batch_size=2, num_workers=workers, store_dir=tmp_path / "labels")
        if not persistent:
            data._options = lambda name, size: {"batch_size": size, "num_workers": workers}  # type: ignore[method-assign]
        checkpoints = pl.callbacks.ModelCheckpoint(
            tmp_path / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1
        )
        fit = trainer(
            callbacks=[callback, witness, checkpoints], enable_checkpointing=True, **{"max_epochs": 3, **options}
        )
        try:
            fit.fit(APLModule(TinyNet(), CLASSES), data, ckpt_path=resume, weights_only=True if resume else None)
        except SystemExit:
            assert stop_at is not None, "Lightning exits after an interrupt"
        return witness.seen, fit

    return fit


LOADERS = [(0, False), (2, False), (2, True)]


def expected(epochs: range, samples: int = 8) -> list[tuple[int, int, int]]:
    return [(epoch, epoch, epoch % CLASSES) for epoch in epochs for _ in range(samples)]


@pytest.mark.parametrize(("workers", "persistent"), LOADERS)
def test_uninterrupted_run(run: Any, workers: int, persistent: bool) -> None:
    seen, _ = run(workers, persistent=persistent)
    assert seen == expected(range(3))


@pytest.mark.parametrize(("workers", "persistent"), LOADERS)
def test_resumed_at_the_end_of_an_epoch(run: Any, tmp_path: Path, workers: int, persistent: bool) -> None:
    run(workers, persistent=persistent, max_epochs=1)
    seen, _ = run(workers, tmp_path / "checkpoints" / "step=4.ckpt", persistent=persistent)
    assert seen == expected(range(1, 3))


@pytest.mark.parametrize(("workers", "persistent"), LOADERS)
def test_resumed_inside_an_epoch(run: Any, tmp_path: Path, workers: int, persistent: bool) -> None:
    run(workers, persistent=persistent, stop_at=6)
    seen, fit = run(workers, tmp_path / "checkpoints" / "step=6.ckpt", persistent=persistent)
    assert seen == expected(range(1, 2), samples=4) + expected(range(2, 3))
    assert fit.global_step == 12


@pytest.mark.parametrize("step", [2, 4])
def test_resume_from_the_previous_round(run: Any, tmp_path: Path, step: int) -> None:
    """The run stopped in round 1, but the checkpoint, within the first epoch or at its end, refers to round 0."""
    run(stop_at=5)
    (tmp_path / "checkpoints" / f"step={step}.ckpt").rename(tmp_path / "kept.ckpt")
    seen, _ = run(0, tmp_path / "kept.ckpt")
    assert seen == expected(range(1), samples=8 - 2 * step) + expected(range(1, 3))


def test_lost_labels_are_made_again_with_a_warning(run: Any, tmp_path: Path) -> None:
    run(stop_at=6)
    for folder in (tmp_path / "labels").glob("*/round-*"):
        folder.rename(tmp_path / folder.name)
    with pytest.warns(UserWarning, match="round 1 are made anew .*is missing or damaged .No such file"):
        seen, _ = run(0, tmp_path / "checkpoints" / "step=6.ckpt")
    assert [round for _, round, _ in seen] == [2] * 4 + [3] * 8


@pytest.mark.parametrize("every", [2, 3])
def test_every_n_epochs(run: Any, tmp_path: Path, every: int) -> None:
    seen, _ = run(every_n_epochs=every, max_epochs=4)
    assert [round for _, round, _ in seen] == [epoch // every for epoch in range(4) for _ in range(8)]


def test_loader_that_prefetches_is_refused(tmp_path: Path, trainer: Make) -> None:
    """A plain DataLoader with workers fetches batches before the labels are made."""
    dataset = TargetDataset(Images(8), tmp_path / "labels")
    loader = DataLoader(dataset, 2, num_workers=2, persistent_workers=True, collate_fn=collate)
    with pytest.raises(RuntimeError, match="no round is there|fetched it too early"):
        trainer(max_epochs=2, callbacks=[PseudoLabelCallback(RoundAsLabel(4, 0.05))]).fit(
            APLModule(TinyNet(), CLASSES), loader
        )


def test_loader_of_another_data_set_is_refused(trainer: Make) -> None:
    with pytest.raises(TypeError, match=r"reads Images: pass the trainer a `TargetDataModule`"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), DataLoader(Images()))


def test_module_without_two_heads_is_refused(tmp_path: Path, trainer: Make) -> None:
    class Supervised(pl.LightningModule):
        def training_step(self, batch: Any) -> Any: ...

        def configure_optimizers(self) -> Any: ...

    data = TargetDataModule(Images(8), store_dir=tmp_path)
    with pytest.raises(TypeError, match="two heads and `class_names`, but got Supervised: pass it to `APLModule`"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(Supervised(), data)


def test_labels_are_made_in_evaluation_mode(tmp_path: Path, trainer: Make) -> None:
    """Compare with a plain loop over untransformed images; the network has dropout and the data a transform."""

    class WithDropout(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.append(torch.nn.Dropout(0.5))

    images = [torch.rand(1, 12, 12), torch.rand(1, 9, 16), torch.rand(1, 12, 12)]

    def flip(sample: dict[str, Any]) -> dict[str, Any]:
        return {key: value.flip(-1) for key, value in sample.items()}

    data = TargetDataModule(images, transform=flip, batch_size=1, store_dir=tmp_path / "labels")
    module = APLModule(WithDropout(), CLASSES, learning_rate=0.0, batch_norm="adapt", dropout=True)
    callback = PseudoLabelCallback(APL(), guard="off")
    fit = trainer(callbacks=[callback])
    fit.fit(module, data)
    module.eval()
    store, confidence, pixels = data.train_dataset.store, 0.0, 0
    for index, image in enumerate(images):
        with torch.no_grad():
            main, aux = (logits.softmax(1)[0] for logits in module(image[None]))
        merged = (main + aux) / 2
        top = merged.topk(2, dim=0).values
        assert torch.equal(store.read(index).labels, merged.argmax(0))
        assert (store.read(index).weights - (top[0] - top[1])).abs().max() < 0.0021
        confidence, pixels = confidence + (top[0] - top[1]).sum().item(), pixels + top[0].numel()
    assert callback.statistics["pseudo/confidence"] == pytest.approx(confidence / pixels, rel=1e-4)


class Labels(pl.Callback):
    """Reads all labels of each round from the store."""

    def __init__(self) -> None:
        self.rounds: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        store = trainer.train_dataloader.dataset.store
        self.rounds.append(torch.stack([store.read(index).labels for index in range(store.length)]))


def test_statistics(tmp_path: Path, trainer: Make) -> None:
    labelled = Images(4, labelled=True)
    data = TargetDataModule(labelled, batch_size=2, store_dir=tmp_path / "labels")
    callback, seen = PseudoLabelCallback(), Labels()
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.05, batch_norm="adapt")
    trainer(callbacks=[callback, seen], max_epochs=2).fit(module, data)
    before, after = seen.rounds
    references = torch.stack(labelled.labels or [])
    found = callback.statistics
    assert found["pseudo/changed"] == pytest.approx((before != after).float().mean().item())
    assert found["pseudo/changed"] > 0
    for c in range(CLASSES):
        assert found[f"pseudo/class_ratio/{c}"] == pytest.approx((after == c).float().mean().item())
    overlap = [((after == c) & (references == c)).sum() for c in (1, 2)]
    sizes = [(after == c).sum() + (references == c).sum() for c in (1, 2)]
    dice = [2 * both / size for both, size in zip(overlap, sizes, strict=True)]
    assert found["pseudo/dice"] == pytest.approx(torch.stack(dice).nanmean().item())


def test_reading_state_changes_nothing(tmp_path: Path, trainer: Make) -> None:
    """Reading the state protects no round from deletion; saving a checkpoint does."""

    class Look(pl.Callback):
        def __init__(self, save: bool) -> None:
            self.save = save

        def _state(self, labels: PseudoLabelCallback) -> dict[str, Any]:
            selection = labels.selection
            state = {**vars(labels), "snapshot": vars(selection.snapshot), "guard": vars(labels.guard)}
            return {
                name: value for name, value in state.items() if name not in ("denoiser", "selection", "log", "log_dict")
            }

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            labels = trainer.callbacks[0]
            before = copy.deepcopy(self._state(labels))
            labels.state_dict()
            assert self._state(labels) == before
            if self.save and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    for save, kept in ((False, ["round-000002"]), (True, ["round-000000", "round-000002"])):
        data = TargetDataModule(Images(), store_dir=tmp_path / str(save))
        callbacks = [PseudoLabelCallback(), Look(save)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*guard='restore'")
            trainer(callbacks=callbacks, max_epochs=3).fit(APLModule(TinyNet(), CLASSES), data)
        (folder,) = (tmp_path / str(save)).iterdir()
        assert sorted(path.name for path in folder.glob("round-*")) == kept


def test_modes_of_submodules_are_kept(tmp_path: Path, trainer: Make) -> None:
    module = APLModule(TinyNet(), CLASSES)
    module.model.network.encoder[3].eval()
    modes = {name: part.training for name, part in module.named_modules()}
    trainer(callbacks=[PseudoLabelCallback()]).fit(module, TargetDataModule(Images(), store_dir=tmp_path / "labels"))
    assert {name: part.training for name, part in module.named_modules()} == modes


def test_nan_predictions_name_the_sample(tmp_path: Path, trainer: Make) -> None:
    class Fragile(TinyNet):
        def forward(self, image: Tensor) -> Tensor:
            features = self.encoder(image) / (image.flatten(1).amax(1) < 2).float().view(-1, 1, 1, 1)
            return self.classifier(features)

    images = [torch.rand(1, 8, 8) * scale for scale in (1, 1, 1, 9)]
    data = TargetDataModule(images, batch_size=3, store_dir=tmp_path / "labels")
    module = APLModule(Fragile(), CLASSES, example=torch.rand(2, 1, 8, 8), batch_norm="frozen")
    with pytest.raises(ValueError, match=r"network gave NaN for samples \[3\]"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(module, data)


def test_nan_weights_name_the_denoiser(tmp_path: Path, trainer: Make) -> None:
    def divide_by_zero(p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        return p_main.argmax(1), p_main[:, 0] * torch.nan

    data = TargetDataModule(Images(3), store_dir=tmp_path / "labels")
    with pytest.raises(ValueError, match=r"the denoiser gave NaN for samples \[0, 1, 2\]: check the denoiser"):
        trainer(callbacks=[PseudoLabelCallback(divide_by_zero)]).fit(APLModule(TinyNet(), CLASSES), data)


@pytest.mark.parametrize("bad", ["pseudo", "reference"])
def test_labels_out_of_range_are_an_error(tmp_path: Path, trainer: Make, bad: str) -> None:
    data = Images(3, labelled=True)
    if bad == "reference":
        assert data.labels is not None
        data.labels[1][0, 0] = 255
    denoiser = {"reference": None, "pseudo": lambda p, q: (p.argmax(1) + 250, torch.ones_like(p[:, 0]))}[bad]
    message = {
        "reference": "reference labels between 0 and 2.*to 255: check `num_classes`, or pass `ignore_index`",
        "pseudo": "ignored by weight 0",
    }[bad]
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[PseudoLabelCallback(denoiser)]).fit(
            APLModule(TinyNet(), CLASSES), TargetDataModule(data, store_dir=tmp_path / "labels")
        )


def test_error_names_the_corrupt_sample(tmp_path: Path, trainer: Make) -> None:
    class Corrupt(Images):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index) * (torch.inf if index == 4 else 1)

    data = TargetDataModule(Corrupt(), store_dir=tmp_path / "labels")
    with pytest.raises(RuntimeError, match="finite values in the image of sample 4"):
        trainer(callbacks=[PseudoLabelCallback()]).fit(APLModule(TinyNet(), CLASSES), data)


def test_progress_bar(tmp_path: Path, trainer: Make, capfd: pytest.CaptureFixture[str]) -> None:
    data = TargetDataModule(Images(), batch_size=2, store_dir=tmp_path / "labels")
    callbacks = [PseudoLabelCallback(), pl.callbacks.TQDMProgressBar()]
    trainer(callbacks=callbacks, enable_progress_bar=True).fit(APLModule(TinyNet(), CLASSES), data)
    assert "Pseudo labels, round 0" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore")  # Rich and Lightning warn about the terminal
def test_rich_progress_bar(tmp_path: Path, trainer: Make) -> None:
    from rich.progress import Progress

    described: list[str] = []

    class Bar(pl.callbacks.RichProgressBar):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            add = Progress.add_task

            def add_task(description: str, **options: Any) -> Any:
                described.append(description)
                return add(self.progress, description, **options)

            self.progress.add_task = add_task

    data = TargetDataModule(Images(), batch_size=2, store_dir=tmp_path / "labels")
    trainer(callbacks=[Bar(), PseudoLabelCallback()], enable_progress_bar=True).fit(APLModule(TinyNet(), CLASSES), data)
    assert "Pseudo labels, round 0" in described


def test_bad_options_are_an_error() -> None:
    with pytest.raises(ValueError, match="`every_n_epochs` to be at least 1, but got 0"):
        PseudoLabelCallback(every_n_epochs=0)


class FullDisk(APL):
    """Fails in the first pass, after the module has prepared itself."""

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> Any:
        raise OSError("no space left on device")


@pytest.mark.parametrize("batch_norm", ["adapt", "auto"])
def test_a_first_round_that_fails_leaves_the_module_as_it_came_in(
    tmp_path: Path, trainer: Any, batch_norm: Any
) -> None:
    """Else a second attempt would take the prepared network for the one that came in."""
    module = APLModule(TinyNet(), CLASSES, batch_norm=batch_norm, aux="fresh")
    before = copy.deepcopy(module.state_dict())
    data = TargetDataModule(Images(6), batch_size=2, store_dir=tmp_path)
    with pytest.raises(OSError, match="no space left"):
        trainer(callbacks=[PseudoLabelCallback(FullDisk())]).fit(module, data)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


class SavesInPass(APL):
    """Saves a checkpoint while it makes the labels of a round, as before a job is taken from its node, and fails."""

    def __init__(self, round: int, path: Path) -> None:
        super().__init__()
        self.fatal, self.path, self.now = round, path, -1
        self.trainer: Any = None

    def begin(self, round: int, *arguments: Any) -> None:
        self.now = round

    def __call__(self, p_main: torch.Tensor, p_aux: torch.Tensor) -> Any:
        if self.now == self.fatal:
            self.trainer.save_checkpoint(self.path)
            raise RuntimeError("taken away")
        return super().__call__(p_main, p_aux)


@pytest.mark.parametrize("round", [0, 1, 2])
def test_resumed_from_a_checkpoint_of_a_label_pass(tmp_path: Path, trainer: Make, round: int) -> None:
    def fit(fatal: int, resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        denoiser = SavesInPass(fatal, tmp_path / "pass.ckpt")
        data = TargetDataModule(Images(8), batch_size=2, store_dir=tmp_path / "labels")
        module = APLModule(TinyNet(), CLASSES, learning_rate=0.02)
        run = denoiser.trainer = trainer(max_epochs=3, callbacks=[PseudoLabelCallback(denoiser, guard="off")])
        try:
            run.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
        except RuntimeError:
            assert fatal >= 0
        return run.global_step, module.state_dict()

    steps, expected_state = fit(-1)
    fit(round)
    resumed_steps, state = fit(-1, tmp_path / "pass.ckpt")
    assert resumed_steps == steps == 12
    for name, value in expected_state.items():
        assert torch.equal(state[name], value), name


def test_statistics_of_an_epoch_that_was_interrupted_are_logged(run: Any, tmp_path: Path) -> None:
    def rows(name: str) -> dict[str, dict[str, str]]:
        with (tmp_path / name / "metrics.csv").open() as file:
            found = [row for row in csv.DictReader(file) if row["pseudo/confidence"]]
        return {row["epoch"]: {key: row[key] for key in row if key.startswith("pseudo/") and row[key]} for row in found}

    def logger(name: str) -> Any:
        return pl.loggers.CSVLogger(tmp_path, name="", version=name)

    run(logger=logger("whole"), log_every_n_steps=1)
    run(logger=logger("resumed"), resume=tmp_path / "checkpoints" / "step=6.ckpt", log_every_n_steps=1)
    whole, resumed = rows("whole"), rows("resumed")
    assert list(resumed) == ["1", "2"]
    assert resumed == {epoch: whole[epoch] for epoch in ("1", "2")}


def test_loader_made_for_one_process_is_refused_by_two(trainer: Make, tmp_path: Path) -> None:
    data = TargetDataModule(Images(4), batch_size=2, store_dir=tmp_path)
    data.setup("fit")
    fit: Any = SimpleNamespace(train_dataloader=data.train_dataloader(), world_size=2)
    with pytest.raises(ValueError, match="Expected the samples of 2 processes, but the training loader was made for 1"):
        target_dataset(fit)

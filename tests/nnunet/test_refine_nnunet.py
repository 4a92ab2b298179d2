"""Real nnU-Nets, trained by nnU-Net, refined by APL, loaded by nnU-Net."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tiny_nnunet import SIZE, SPACING, environment, phantom, plan, read, train, write, write_dataset
from torch import Tensor

from apl_lightning import nnunet
from apl_lightning.cli import main
from apl_lightning.data import RandomPatches
from apl_lightning.nnunet.network import load_network, read_plan
from apl_lightning.nnunet.results_folder import find_folds
from apl_lightning.nnunet.windows import Windows

PAGE = Path(__file__).parents[2] / "docs/have/nnunet.md"
FINAL = "checkpoint_final.pth"
TARGETS = {100: SIZE, 101: SIZE, 102: (11, 62, 50)}  # the last one has pixels of 0.8 mm: resampled to (11, 50, 40)
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}


class Keep(pl.Callback):
    """Keeps the module that was refined."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.module = pl_module


class Note(pl.Callback):
    """Writes a file, as a callback that draws pictures does."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(exist_ok=True)
        (folder / "note.txt").touch()


class Run(NamedTuple):
    source: Path
    refined: Path
    module: Any
    logged: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        write_dataset(folder)
        for case, size in TARGETS.items():
            spacing = SPACING if size == SIZE else (2.0, 0.8, 0.8)
            write(phantom(case, True, size)[0], folder / "targets" / f"t{case}_0000.nii.gz", spacing)
        yield folder


@pytest.fixture(scope="module")
def trained_2d(root: Path) -> Path:
    return train(root, plan("2d", residual=False, patch_size=[32, 32]), "2d", {0: 200, 1: 3})


@pytest.fixture(scope="module")
def run_2d(root: Path, trained_2d: Path) -> Run:
    return run(root, trained_2d, folds=[0], epochs=6, steps=20)


@pytest.fixture(scope="module")
def run_3d(root: Path) -> Run:
    plans = plan("3d_fullres", residual=True, patch_size=[8, 32, 32])
    return run(root, train(root, plans, "3d_fullres", {"all": 80}), folds=["all"], epochs=4, steps=10)


@pytest.fixture(params=["run_2d", "run_3d"])
def refined(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found


def run(root: Path, source: Path, folds: list[int | str], epochs: int, steps: int) -> Run:
    keep, out = Keep(), root / f"refined_{source.name}"
    options = {**QUIET, "callbacks": [keep, Note()]}
    length = {"max_epochs": epochs, "steps_per_epoch": steps}
    logged = nnunet.refine(source, root / "targets", out, folds, **length, check=False, trainer_options=options)
    return Run(source, out, keep.module, logged)


def predictor(folder: Path, mirroring: bool = False) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    found = nnUNetPredictor(
        use_mirroring=mirroring, device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False
    )
    fold = "all" if (folder / "fold_all").exists() else 0
    found.initialize_from_trained_model_folder(str(folder), (fold,), FINAL)
    return found


def preprocessed(root: Path, by: Any, case: int) -> Tensor:
    """A target image (C, Z, Y, X), as nnU-Net preprocesses it."""
    preprocessor = by.configuration_manager.preprocessor_class(verbose=False)
    files = [str(root / "targets" / f"t{case}_0000.nii.gz")]
    volume, _, _ = preprocessor.run_case(files, None, by.plans_manager, by.configuration_manager, by.dataset_json)
    return torch.from_numpy(volume)


def logits_of(network: Any, inferer: Any, volume: Tensor, dimensions: int) -> Tensor:
    """The main logits (classes, Z, Y, X) of a network with two heads; slice by slice in 2D."""
    images = volume.movedim(1, 0) if dimensions == 2 else volume[None]
    with torch.no_grad():
        main = inferer(images, network.eval())[0]
    return main.movedim(0, 1) if dimensions == 2 else main[0]


def mean_dice(root: Path, folder: Path) -> float:
    """The mean Dice of the label maps that nnU-Net writes for the target images."""
    files = [[str(root / "targets" / f"t{case}_0000.nii.gz")] for case in TARGETS]
    out = root / "labels" / folder.name
    out.mkdir(parents=True)
    predictor(folder).predict_from_files_sequential(files, str(out))
    scores = []
    for case, size in TARGETS.items():
        labels, reference = read(out / f"t{case}.nii.gz"), phantom(case, size=size)[1]
        for label in (1, 2):
            ours, theirs = labels == label, reference == label
            scores.append(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
    return float(np.mean(scores))


def test_the_dice_on_shifted_images_rises(root: Path, refined: Run) -> None:
    assert mean_dice(root, refined.refined) > mean_dice(root, refined.source) + 0.03


def in_single_precision(by: Any, volume: Tensor) -> Tensor:
    """The logits of nnU-Net, which sums them in half precision: at the border that changes them by up to 0.5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "half", torch.float32)
        logits: Tensor = by.predict_logits_from_preprocessed_data(volume)
    assert logits.dtype == torch.float32
    return logits


def test_nnunet_predicts_what_the_module_predicts(root: Path, refined: Run) -> None:
    by = predictor(refined.refined)
    dimensions = len(by.configuration_manager.patch_size)
    for case in TARGETS:
        volume = preprocessed(root, by, case)
        ours = logits_of(refined.module, refined.module.inferer, volume, dimensions)
        torch.testing.assert_close(ours, in_single_precision(by, volume), atol=1e-4, rtol=1e-4)
        theirs = by.predict_logits_from_preprocessed_data(volume)
        assert (ours.argmax(dim=0) == theirs.argmax(dim=0)).float().mean() > 0.999


@pytest.mark.parametrize("mirroring", [False, True])
@pytest.mark.parametrize("size", [(2, 20, 32), (3, 32, 49), (1, 71, 90)])
def test_windows_are_those_of_nnunet(run_2d: Run, size: tuple[int, ...], mirroring: bool) -> None:
    by = predictor(run_2d.refined, mirroring)
    volume, axes = torch.randn(1, *size), by.allowed_mirroring_axes if mirroring else ()
    ours = logits_of(run_2d.module, Windows((32, 32), axes), volume, 2)
    torch.testing.assert_close(ours, in_single_precision(by, volume), atol=1e-4, rtol=1e-4)


def test_only_the_weights_of_the_checkpoint_differ(refined: Run) -> None:
    path, note = sorted(refined.refined.glob("fold_*/*"))
    assert note.name == "note.txt", "what callbacks write stays"
    before, after = (torch.load(folder / path.parent.name / FINAL, weights_only=False) for folder in refined[:2])
    assert path.name == FINAL
    assert list(before) == list(after)
    weights, refined_weights = before.pop("network_weights"), after.pop("network_weights")
    assert list(weights) == list(refined_weights)
    assert any(not torch.equal(weights[name], refined_weights[name]) for name in weights)
    assert all(torch.equal(weights[n], refined_weights[n]) for n in weights if "seg_layers.0" in n)  # deep supervision
    torch.testing.assert_close(before.pop("optimizer_state"), after.pop("optimizer_state"), rtol=0, atol=0)
    assert before == after


def test_the_results_folder_has_nothing_else(refined: Run) -> None:
    found = {path.name for path in refined.refined.iterdir()}
    assert found == {"plans.json", "dataset.json", "dataset_fingerprint.json", *refined.logged}
    for name in ("plans.json", "dataset.json"):
        assert (refined.refined / name).read_bytes() == (refined.source / name).read_bytes()
    assert all("pseudo/estimated_gain" in values for values in refined.logged.values())


def test_the_page_refines_all_folds(
    root: Path, trained_2d: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    (tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres").symlink_to(trained_2d)
    (tmp_path / "target_images").symlink_to(root / "targets")
    monkeypatch.chdir(tmp_path)
    exec(re.sub("max_epochs=10, steps_per_epoch=50", "max_epochs=1, steps_per_epoch=2", code), {})
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("refined/fold_*/*"))
    assert written == [f"refined/fold_0/{FINAL}", f"refined/fold_1/{FINAL}"]
    predictor(tmp_path / "refined")  # loads it


def test_mirroring_and_the_best_checkpoint(root: Path, trained_2d: Path, tmp_path: Path) -> None:
    best, keep = "checkpoint_best.pth", Keep()
    options: dict[str, Any] = {**QUIET, "callbacks": [keep], "fast_dev_run": 1}
    nnunet.refine(trained_2d, root / "targets", tmp_path, [1, "1"], best, mirroring=True, trainer_options=options)
    assert [path.name for path in tmp_path.glob("fold_*/*")] == [best]
    volume = preprocessed(root, by := predictor(trained_2d), 100)[:, :1]
    averaged = logits_of(keep.module, Windows((32, 32), by.allowed_mirroring_axes), volume, 2)
    assert torch.equal(logits_of(keep.module, keep.module.inferer, volume, 2), averaged)
    assert not torch.allclose(logits_of(keep.module, Windows((32, 32)), volume, 2), averaged)


@pytest.fixture
def copied(trained_2d: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_2d, tmp_path / "results"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_ignore_label_is_no_class(copied: Path) -> None:
    edit(copied / "dataset.json", labels={"background": 0, "first": 1, "second": 2, "ignore": 3})
    assert read_plan(copied, "2d").class_names == ["background", "first", "second"]
    network, axes = load_network(copied, "fold_0", FINAL)
    assert axes == (0, 1)
    assert network(read_plan(copied, "2d").example(network)).shape[1] == 3


@pytest.mark.parametrize("last", [10, "10", [10]])
def test_labels_as_text_and_lists(copied: Path, last: Any) -> None:
    kind = type(last)
    values = {f"c{value}": kind([value]) if kind is list else kind(value) for value in (2, 1, 9)}
    edit(copied / "dataset.json", labels={"last": last, "background": 0, **values})
    assert read_plan(copied, "2d").class_names == ["background", "c1", "c2", "c9", "last"]


class OnlyPatches(torch.nn.Module):
    """A network that accepts nothing but patches, as transformers do."""

    def forward(self, image: Tensor) -> Tensor:
        return image.view(len(image), 1, 32, 32)


def test_network_that_takes_only_patches(trained_2d: Path) -> None:
    plan = read_plan(trained_2d, "2d")
    assert plan.example(OnlyPatches()).shape == (2, 1, 32, 32)
    assert plan.example(torch.nn.Identity()).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("folds", [None, np.arange(2), ["fold_0", 1], [0, "1"]])
def test_folders_that_somebody_has_kept_are_no_folds(copied: Path, folds: Any) -> None:
    shutil.copytree(copied / "fold_0", copied / "fold_0_old")
    assert find_folds(copied, folds, FINAL) == ["fold_0", "fold_1"]
    assert find_folds(copied, np.int64(1), FINAL) == ["fold_1"]


def test_no_memory_for_all_windows(run_2d: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then their sums are on the CPU, and those of the first attempt are gone."""
    windows, volume = Windows((32, 32)), torch.randn(1, 2, 50, 40)
    expected = logits_of(run_2d.module, windows, volume, 2)
    zeros, made, devices = torch.zeros, [], []
    run = Windows._run

    def full(*size: Any, **options: Any) -> Tensor:
        if len(devices) == 1 and made:
            raise torch.OutOfMemoryError
        tensor = zeros(*size, **options)
        if len(devices) == 1:
            made.append(weakref.ref(tensor))
        else:
            assert made[0]() is None, "the first attempt still holds its memory"
        return tensor

    def noted(self: Windows, images: Tensor, network: Any, device: torch.device) -> Any:
        devices.append(device)
        return run(self, images, network, device)

    monkeypatch.setattr(torch, "zeros", full)
    monkeypatch.setattr(Windows, "_run", noted)
    assert torch.equal(logits_of(run_2d.module, windows, volume, 2), expected)
    assert made
    assert devices[1:] == [torch.device("cpu")]


def test_small_images_are_padded_alike_in_patches_and_windows() -> None:
    seen: list[Tensor] = []

    def network(patches: Tensor) -> list[Tensor]:
        seen.append(patches)
        return [patches]

    image = torch.rand(1, 4, 8)
    Windows((8, 8))(image[None], network)
    weight = torch.ones(1, 4, 8)
    (patch,) = RandomPatches((8, 8), padding="constant")({"image": image, "pseudo_label": weight, "weight": weight})
    assert torch.equal(seen[0][0], patch["image"])


def test_regions_are_refused(root: Path, copied: Path, tmp_path: Path) -> None:
    regions = {"background": 0, "both": [1, 2], "second": 2}
    edit(copied / "dataset.json", labels=regions, regions_class_order=[1, 2])
    with pytest.raises(ValueError, match=r"region-based training.*trained on plain labels"):
        nnunet.refine(copied, root / "targets", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cascade_is_refused(root: Path, copied: Path, tmp_path: Path) -> None:
    configurations = json.loads((copied / "plans.json").read_text())["configurations"]
    configurations["2d"]["previous_stage"] = "3d_lowres"
    edit(copied / "plans.json", configurations=configurations)
    with pytest.raises(ValueError, match=r"2d is a cascade.*refine 3d_lowres or 3d_fullres"):
        nnunet.refine(copied, root / "targets", tmp_path / "out")


def test_nothing_is_overwritten(root: Path, trained_2d: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="Expected `out` to be a new or an empty folder"):
        nnunet.refine(trained_2d, root / "targets", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_run_leaves_an_empty_folder(trained_2d: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "t_0000.nii.gz").write_text("no image")
    with pytest.raises(ValueError, match=r"(?s)Expected nnU-Net to read .*t_0000\.nii\.gz.*mend or remove"):
        nnunet.refine(trained_2d, tmp_path / "images", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"results_folder": "fold_0"}, "no plans.json: pass the folder that is named after the trainer"),
        ({"folds": [0, 4]}, "fold_0, fold_4 .* that have it are fold_0, fold_1: pass other `folds`"),
        ({"folds": "all"}, "in fold_all of .* that have it are fold_0, fold_1: pass other `folds`"),
        ({"folds": 4}, "in fold_4 of .* that have it are fold_0, fold_1: pass other `folds`"),
        ({"checkpoint": "checkpoint_latest.pth"}, "that have it are none: pass checkpoint='checkpoint_best.pth'"),
        ({"images": "nowhere"}, "to be a folder, but there is none at .*nowhere: pass its path"),
        ({"images": "fold_0"}, "case_0000.nii.gz for the first channel, but .*: rename or convert them"),
    ],
)
def test_wrong_input_is_named(
    root: Path, trained_2d: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given = {"results_folder": trained_2d, "images": root / "targets", "out": tmp_path / "out", **options}
    for name in ("results_folder", "images"):
        given[name] = trained_2d / given[name]
    with pytest.raises(ValueError, match=message):
        nnunet.refine(**given)
    assert not (tmp_path / "out").exists()


def test_a_missing_channel_is_named(trained_2d: Path, tmp_path: Path) -> None:
    (tmp_path / "a_0001.nii.gz").touch()
    with pytest.raises(ValueError, match=r"Expected 1 files? for each case.* a has \['a_0001.nii.gz'\]"):
        nnunet.refine(trained_2d, tmp_path, tmp_path / "out")


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_not_executed(root: Path, copied: Path, tmp_path: Path) -> None:
    path = copied / "fold_1" / FINAL
    torch.save({**torch.load(path, weights_only=False), "extra": Harmful(tmp_path / "harm")}, path)
    with pytest.raises(ValueError, match=r"fold_1.*without executing code from it failed \(.*mkdir.*\): copy"):
        nnunet.refine(copied, root / "targets", tmp_path / "out", folds=[1])
    assert not (tmp_path / "harm").exists()


def test_nnunet_is_imported_where_it_is_used() -> None:
    for path in Path(nnunet.__file__).parent.glob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("nnunetv2" in ast.unparse(node) for node in imports)


def test_command_line(root: Path, trained_2d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"results_folder": trained_2d, "images": root / "targets", "out": tmp_path / "refined", "folds": "[0,1]"}
    few = {"max_epochs": 1, "steps_per_epoch": 1, "batch_size": 1, "check": False, "accelerator": "cpu"}
    options = [f"--{name}={value}" for name, value in (given | few).items()]
    assert main(["nnunet", *options]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^(fold_[01]): estimated gain [+-]\d+\.\d points of Dice$", shown, re.MULTILINE) == [
        "fold_0",
        "fold_1",
    ]

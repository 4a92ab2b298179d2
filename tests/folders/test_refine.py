"""From a folder to a folder: label maps fit their files, and refinement on shifted phantoms gains."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from phantoms import AFFINES, Array, affine, blobs, write
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from apl_lightning import DualHeadModel, PseudoLabelCallback, TargetDataModule, add_dual_heads
from apl_lightning._support.files import claimed, save_weights
from apl_lightning.checkpoints import SIFA, ResnetGenerator, Translated
from apl_lightning.data import NiftiFolder, sliding_window
from apl_lightning.folders import as_folder_and_network, evaluate_folder, network_of_yaml, predict_folder, refine_folder
from apl_lightning.folders.pictures import save_picture
from apl_lightning.folders.refine import Unlabelled
from apl_lightning.nifti import read_grid

NAMES = ["background", "liver", "spleen"]
TARGETS = {"LPS": (48, 48, 12), "RAS": (48, 48, 11), "oblique": (48, 46, 12), "sagittal": (12, 48, 48)}


def network(dimensions: int) -> nn.Module:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 8), (8, 8)):
        layers += [conv(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, conv(8, 3, 1))


def scan(labels: Array, seed: int, noise: float = 0.08, gain: float = 1.0, offset: float = 0.0) -> Array:
    """Intensities that tell the classes apart; the scanner has noise, a gain and an offset."""
    error = noise * np.random.default_rng(seed).standard_normal(labels.shape)
    values: Array = (np.array([0.2, 0.55, 0.9])[labels] + error) * gain + offset
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A network that segments phantoms of the source scanner."""
    torch.manual_seed(0)
    labels = blobs((32, 32, 16), affine())
    images = torch.from_numpy(scan(labels, seed=0)).movedim(2, 0)[:, None]
    targets = torch.from_numpy(labels).long().movedim(2, 0)
    model = network(2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(80):
        chosen = torch.arange(step % 2, len(images), 2)
        loss = nn.functional.cross_entropy(model(images[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Scans of another scanner, on grids of all kinds, with their reference labels beside them."""
    for seed, (name, shape) in enumerate(TARGETS.items()):
        labels = blobs(shape, AFFINES[name])
        write(tmp_path / "images" / f"{name}.nii.gz", scan(labels, seed, 0.2, 0.95, 0.05), AFFINES[name])
        write(tmp_path / "references" / f"{name}.nii.gz", labels, AFFINES[name])
    return tmp_path


def dice_of(folder: Path, references: Path) -> float:
    return evaluate_folder(folder / "labels", references, class_names=NAMES)[-1].dice


@pytest.mark.filterwarnings("ignore:Your images look 1.5 times too large")  # without noise, a network is surer
def test_refinement_gains_and_writes_all_results(target: Path, source: nn.Module) -> None:
    images = NiftiFolder(target / "images", plane="axial", orientation="PLS", size=(48, 48))
    predict_folder(images, source, target / "before", 3, class_names=NAMES, accelerator="cpu")
    given = {key: value.clone() for key, value in source.state_dict().items()}
    refined = refine_folder(
        images, source, target / "after", 3, class_names=NAMES, steps_per_epoch=None, max_epochs=3, accelerator="cpu"
    )
    before, after = (dice_of(target / name, target / "references") for name in ("before", "after"))
    assert after > before + 0.04
    assert sorted(path.name for path in (target / "after").iterdir()) == [
        "labels", "pictures", "refined.pt", "volumes.csv",
    ]  # fmt: skip
    state = torch.load(target / "after" / "refined.pt", weights_only=True)
    network(2).load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in refined.state_dict().items())
    assert all(torch.equal(value, given[key]) for key, value in source.state_dict().items())
    rows = list(csv.DictReader((target / "after" / "volumes.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == sorted(TARGETS)
    for row in rows:
        written = nibabel.load(target / "after" / "labels" / f"{row['case']}.nii.gz")
        original = nibabel.load(target / "images" / f"{row['case']}.nii.gz")
        assert np.array_equal(written.affine, original.affine)
        voxels = (np.asarray(written.dataobj) == 1).sum()
        assert float(row["liver_ml"]) == pytest.approx(voxels * np.prod(written.header.get_zooms()) / 1000, abs=1e-3)
        picture = (target / "after" / "pictures" / f"{row['case']}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    # The refined network predicts the same labels again.
    predict_folder(images, refined, target / "again", 3, class_names=NAMES, accelerator="cpu")
    for name in TARGETS:
        first, second = (nibabel.load(target / f / "labels" / f"{name}.nii.gz") for f in ("after", "again"))
        assert np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))


def test_labels_are_those_of_the_network(target: Path, source: nn.Module) -> None:
    """Without resampling, a file holds what the network says of each slice of the array. It may be frozen."""
    frozen = copy.deepcopy(source).requires_grad_(False)
    predict_folder(NiftiFolder(target / "images", plane="axial"), frozen, target / "out", 3, accelerator="cpu")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    canonical = nibabel.as_closest_canonical(nibabel.load(target / "images" / "oblique.nii.gz"))
    slices = torch.from_numpy(np.array(canonical.dataobj, order="C")).movedim(2, 0)[:, None]
    with torch.no_grad():
        expected = source(slices).argmax(dim=1).movedim(0, 2).numpy()
    written = nibabel.as_closest_canonical(nibabel.load(target / "out" / "labels" / "oblique.nii.gz"))
    assert np.array_equal(np.asarray(written.dataobj), expected)


def test_volumes_of_different_sizes_by_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network(3).eval()
    for name, shape in {"LPS": (20, 22, 9), "RAS": (16, 18, 12)}.items():
        write(tmp_path / "images" / f"{name}.nii.gz", scan(blobs(shape, AFFINES[name]), seed=0), AFFINES[name])
    images = NiftiFolder(tmp_path / "images", orientation=None, normalize=True)
    options: dict[str, Any] = {"patch_size": (16, 16, 8), "accelerator": "cpu"}
    predict_folder(images, model, tmp_path / "before", 3, **options)
    with torch.no_grad():
        expected = sliding_window((16, 16, 8))(images[0]["image"][None], model).argmax(dim=1)[0]
    written = nibabel.load(tmp_path / "before" / "labels" / "LPS.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), expected.numpy())
    refined = refine_folder(images, model, tmp_path / "out", 3, max_epochs=1, steps_per_epoch=2, **options)
    assert list(refined.state_dict()) == list(model.state_dict())
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 2


class Labelled(nn.Module):
    """A network that returns one logit for each of two labels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 4, 3, padding=1)
        self.organ, self.tumour = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 1, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(image)
        return self.organ(features), self.tumour(features)


def test_options_of_heads_are_set_by_add_dual_heads(target: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, network = NiftiFolder(target / "images", plane="axial"), Labelled().eval()
    with pytest.raises(ValueError, match="These are options of `add_dual_heads`, whose result is a network here too"):
        predict_folder(images, network, tmp_path / "out", 2, accelerator="cpu")
    tumour = add_dual_heads(network, 2, main_output=1)
    predict_folder(images, tumour, tmp_path / "out", 2, accelerator="cpu")
    with torch.no_grad():
        logits = network(torch.stack([images[index]["image"] for index in images.samples_of(0)]))[1]
    found = nibabel.load(tmp_path / "out" / "labels" / f"{images.cases[0].name}.nii.gz")
    assert 0 < np.asarray(found.dataobj).sum() == (logits > 0).sum()


def test_heads_in_a_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "network.yaml").write_text(
        "class_path: apl_lightning.add_dual_heads\n"
        "init_args:\n"
        "  model:\n"
        "    class_path: monai.networks.nets.UNet\n"
        "    init_args: {spatial_dims: 2, in_channels: 1, out_channels: 3, channels: [4, 8], strides: [2]}\n"
        "  num_classes: 3\n"
        "  aux: fresh\n"
    )
    model = network_of_yaml(tmp_path / "network.yaml")
    assert isinstance(model, DualHeadModel)
    assert not model.warm, "a fresh head waits for the images"


def test_page(tmp_path: Path, source: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "have" / "nifti.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 15
    for name, shape in {"LPS": (30, 30, 6), "RAS": (28, 32, 5)}.items():
        labels = blobs(shape, AFFINES[name])
        write(tmp_path / "images" / f"{name}.nii.gz", scan(labels, seed=0), AFFINES[name])
        write(tmp_path / "references" / f"{name}.nii.gz", labels, AFFINES[name])
    monkeypatch.chdir(tmp_path)
    torch.save(source.state_dict(), "source.pt")
    scope: dict[str, Any] = {"MyNetwork": lambda: copy.deepcopy(source)}
    exec(code.replace("256, 256", "32, 32").replace('"after",', '"after", steps_per_epoch=3,'), scope)
    assert [score.name for score in scope["scores"]][-3:] == ["liver", "spleen", "mean"]
    for line in page.split("holds\n\n")[1].split("\n\n")[0].splitlines():
        assert list((tmp_path / "after").glob(line.split("`")[1].replace("<case>", "*"))), line


def test_labels_of_the_folder_are_not_read(target: Path) -> None:
    labelled = NiftiFolder(target / "images", target / "references")
    assert "label" in labelled[0]
    assert set(Unlabelled(labelled)[0]) == {"image", "case"}


def test_nothing_is_overwritten(target: Path, source: nn.Module) -> None:
    for function in (predict_folder, refine_folder):
        with pytest.raises(ValueError, match="Expected `out` to be a new or an empty folder"):
            function(target / "images", source, target / "references", 3)
        with pytest.raises(ValueError, match="Expected `out` to be a new or an empty folder"):
            function(target / "images", source, target / "images" / "LPS.nii.gz", 3)
    assert len(list((target / "references").iterdir())) == len(TARGETS)


def test_arguments_that_do_not_fit(target: Path, source: nn.Module) -> None:
    slices = NiftiFolder(target / "images", plane="axial")
    with pytest.raises(ValueError, match="Expected images of one size in a batch"):
        refine_folder(slices, source, target / "out", 3)
    with pytest.raises(ValueError, match="`patch_size` of 2 numbers for images in 2D"):
        predict_folder(slices, source, target / "out", 3, patch_size=(8, 8, 8))
    with pytest.raises(
        ValueError, match=r'in 2D, as Sequential has .* in 3D: `NiftiFolder\(..., plane="axial"\)` makes'
    ):
        predict_folder(target / "images", source, target / "out", 3)
    with pytest.raises(ValueError, match="in 3D, as Sequential has .* in 2D: leave out `plane`"):
        predict_folder(slices, network(3), target / "out", 3)
    with pytest.raises(ValueError, match="Expected the system that saved"):
        predict_folder(slices, target / "refined.pt", target / "out", 3)
    with pytest.raises(ValueError, match="leave out `system`"):
        predict_folder(slices, source, target / "out", 3, system="advent")
    with pytest.raises(ValueError, match="Expected a system that segments, but got 'cyclegan'"):
        predict_folder(slices, target / "generator.pth", target / "out", 3, system="cyclegan")
    assert not (target / "out").exists()


def test_two_runs_do_not_share_a_folder(target: Path, source: nn.Module) -> None:
    class Other(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with pytest.raises(ValueError, match="Expected `out` to be a new or an empty folder"):
                refine_folder(images, source, target / "out", 3, **options)
            with pytest.raises(ValueError, match="a run works in"), claimed(target / "out"):
                pytest.fail("claimed twice")

    images = NiftiFolder(target / "images", plane="axial", size=(48, 48))
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "steps_per_epoch": 2, "check": False}
    elsewhere = {"callbacks": [Other(), PseudoLabelCallback()], "default_root_dir": target / "root"}
    refine_folder(images, source, target / "out", 3, trainer_options=elsewhere, **options)
    assert {path.name for path in (target / "out").iterdir()} == {"refined.pt", "labels", "pictures", "volumes.csv"}


def test_weights_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *_: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device while writing refined.pt .*: free some space"):
        save_weights(nn.Conv2d(1, 1, 1), tmp_path / "refined.pt")
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_an_empty_folder(target: Path, source: nn.Module) -> None:
    images = NiftiFolder(target / "images", plane="axial", size=(48, 48))
    with pytest.raises(ValueError, match="num_classes|channels"):
        refine_folder(images, source, target / "out", 4, accelerator="cpu")
    assert list((target / "out").iterdir()) == []


def test_validation_takes_the_labels_of_a_folder(target: Path) -> None:
    labelled = NiftiFolder(target / "images", target / "references", plane="axial", size=(48, 48))
    data = TargetDataModule(train=labelled, val=labelled)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (8, 1, 48, 48)
    assert batch["label"].unique().tolist() == [0, 1, 2]
    assert set(batch["case"]) == {"LPS"}


def test_images_are_prepared_as_the_system_needs_them(tmp_path: Path) -> None:
    """SynSeg-Net takes [-1, 1]."""
    torch.manual_seed(0)
    network = ResnetGenerator(1, 3, width=8, blocks=6, tanh=False).eval()
    torch.save(network.state_dict(), tmp_path / "segmenter.pth")
    values = np.random.default_rng(0).random((16, 16, 2)).astype(np.float32)
    write(tmp_path / "images" / "a.nii.gz", values, affine())
    images = NiftiFolder(tmp_path / "images", plane="axial")
    predict_folder(images, tmp_path / "segmenter.pth", tmp_path / "out", 3, system="synseg", accelerator="cpu")
    found = nibabel.load(tmp_path / "out" / "labels" / "a.nii.gz").get_fdata()
    with torch.no_grad():
        expected = network(torch.from_numpy(values).movedim(2, 0)[:, None] * 2 - 1).argmax(1)
    assert np.array_equal(found, expected.movedim(0, 2).numpy())
    (tmp_path / "network.yaml").write_text(
        "class_path: apl_lightning.checkpoints.load\n"
        f"init_args: {{system: synseg, path: {tmp_path / 'segmenter.pth'}, num_classes: 3}}\n"
    )
    predict_folder(images, tmp_path / "network.yaml", tmp_path / "same", 3, accelerator="cpu")
    assert np.array_equal(nibabel.load(tmp_path / "same" / "labels" / "a.nii.gz").get_fdata(), found)


def test_options_of_a_system(tmp_path: Path) -> None:
    """SIFA's bounds differ between CT and MR."""
    torch.save(SIFA(3, width=2).state_dict(), tmp_path / "sifa.pth")
    write(tmp_path / "images" / "a.nii.gz", blobs((16, 16, 4), affine()), affine())
    folder = NiftiFolder(tmp_path / "images", plane="axial")
    for options, bounds in ((None, (-2.8, 3.2)), ({"bounds": (-1.8, 4.4)}, (-1.8, 4.4))):
        network = as_folder_and_network(folder, tmp_path / "sifa.pth", 3, "sifa-v1", options)[1]
        assert network.bounds == bounds


class Wrapped(nn.Module):
    """A network of a system that prepares its images itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> Any:
        return self.network(2 * image - 1)


def test_images_of_other_networks_stay_as_they_are(target: Path, source: nn.Module) -> None:
    folder = NiftiFolder(target / "images", plane="axial")
    own = Translated(nn.Conv2d(1, 1, 1), source, value_range=(0, 1))
    for network in (source, own, Wrapped(ResnetGenerator(1, 3, width=8, blocks=6, tanh=False))):
        assert as_folder_and_network(folder, network, 3, None) == (folder, network)
    translated = Translated(ResnetGenerator(1, 1, width=8, blocks=6), source, value_range=(0, 1))
    assert as_folder_and_network(folder, translated, 3, None)[0].preprocess == translated.generator.preprocess


@pytest.mark.parametrize("accelerator", ["CPU", "npu"])
def test_unknown_accelerator(tmp_path: Path, accelerator: str) -> None:
    write(tmp_path / "images" / "a.nii.gz", blobs((8, 8, 4), affine()), affine())
    with pytest.raises(ValueError, match="'cpu' or a device of this machine"):
        predict_folder(tmp_path / "images", network(3), tmp_path / "out", 3, accelerator=accelerator)


class OneSize(nn.Sequential):
    """A network that takes only images of 24 x 20, as one with position embeddings does."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if image.shape[2:] != (24, 20):
            raise RuntimeError(f"no embedding for {tuple(image.shape[2:])}")
        logits: torch.Tensor = super().forward(image)
        return logits


def test_network_for_images_of_one_size(target: Path) -> None:
    images = NiftiFolder(target / "images", plane="axial", size=(24, 20))
    predict_folder(images, OneSize(*network(2)), target / "whole", 3, accelerator="cpu")
    images = NiftiFolder(target / "images", plane="axial")
    predict_folder(images, OneSize(*network(2)), target / "patches", 3, patch_size=(24, 20), accelerator="cpu")
    assert len(list((target / "patches" / "labels").iterdir())) == len(TARGETS)
    options: Any = {"patch_size": (24, 20), "steps_per_epoch": 1, "max_epochs": 1, "accelerator": "cpu"}
    refine_folder(images, OneSize(*network(2)), target / "refined", 3, **options)  # preflight runs too


def test_images_that_the_network_cannot_take(target: Path) -> None:
    class Even(nn.Sequential):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if image.shape[2] % 8:
                raise RuntimeError("sizes must match")
            logits: torch.Tensor = super().forward(image)
            return logits

    images = NiftiFolder(target / "images", plane="sagittal")
    expected = (
        r"shape .* = \(1, 46, 12\), those of case 'oblique', .* sizes must match\. If the size is the reason, pass"
    )
    with pytest.raises(ValueError, match=expected):
        predict_folder(images, Even(*network(2)), target / "out", 3, accelerator="cpu")


def test_options_of_the_run(target: Path, source: nn.Module) -> None:
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            rates.extend(group["lr"] for group in trainer.optimizers[0].param_groups)
            (Path(trainer.default_root_dir) / "rates.txt").write_text(str(rates))

    options = {"callbacks": [Rates()], "limit_train_batches": 1, "logger": CSVLogger(target, name="log")}
    folder = NiftiFolder(target / "images", plane="axial", size=(24, 20))
    run = {"accelerator": "cpu", "max_epochs": 1, "steps_per_epoch": 2, "check": False}
    refine_folder(folder, source, target / "out", 3, learning_rate=1e-3, trainer_options=options, **run)  # type: ignore[arg-type]
    assert rates == pytest.approx([1e-3, 1e-4])
    assert (target / "out" / "rates.txt").exists(), "what callbacks write stays"
    assert "pseudo/estimated_gain" in (target / "log" / "version_0" / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="Expected one process, but got devices=2"):
        refine_folder(folder, source, target / "two", 3, trainer_options={"devices": 2}, **run)  # type: ignore[arg-type]


def test_names_that_the_font_of_pictures_lacks(tmp_path: Path) -> None:
    write(tmp_path / "images" / "患者 1.nii.gz", scan(blobs((16, 16, 4), affine()), seed=0), affine())
    predict_folder(NiftiFolder(tmp_path / "images", plane="axial"), network(2), tmp_path / "out", 3, accelerator="cpu")
    assert (tmp_path / "out" / "pictures" / "患者 1.png").exists()


def test_networks_in_yaml_files(target: Path) -> None:
    images = NiftiFolder(target / "images", plane="axial")
    for content in ("class_path: torch.nn.Conv2dX", "class_path: torch.nn.Conv2d\ninit_args: {nonsense: 1}", "1"):
        (target / "network.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"network.yaml to have the `class_path` and `init_args` of a network: "):
            predict_folder(images, target / "network.yaml", target / "out", 3, accelerator="cpu")
    with pytest.raises(ValueError, match="No such file"):
        predict_folder(images, target / "missing.yaml", target / "out", 3, accelerator="cpu")


def test_network_that_accepts_nothing(target: Path) -> None:
    class Broken(nn.Sequential):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("boom")

    with pytest.raises(ValueError, match="to accept images of shape .* raised RuntimeError: boom"):
        predict_folder(NiftiFolder(target / "images", plane="axial"), Broken(*network(2)), target / "out", 3)


def test_network_within_a_project(target: Path, source: nn.Module) -> None:
    """A LightningModule without `forward`, whose network is found in it."""

    class Project(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = source

    images = NiftiFolder(target / "images", plane="axial")
    for name, given in (("project", Project()), ("network", source)):
        predict_folder(images, given, target / name, 3, accelerator="cpu")
    tables = [(target / name / "volumes.csv").read_text() for name in ("project", "network")]
    assert tables[0] == tables[1]


def test_names_are_no_formulas(tmp_path: Path) -> None:
    image, labels = np.zeros((4, 4, 2), np.float32), np.ones((4, 4, 2), np.uint8)
    grid = read_grid(write(tmp_path / "a.nii.gz", image, AFFINES["RAS"]))
    save_picture(tmp_path / "a.png", "pt$_^$1", image, labels, grid, ["background", "$_^$"], "axial")
    assert (tmp_path / "a.png").exists()

"""Planted mistakes are found by networks that know better; images as they are draw no alarm."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, TinyNet
from organs import phantoms, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

from apl_lightning import APLModule
from apl_lightning.preflight import MARGINS, PreflightReport, Trial, View, best_of, preflight
from apl_lightning.preflight.sample import centre
from apl_lightning.preflight.views import views_of

SLICES = phantoms(16, 2, seed=2)[0]
VOLUMES = phantoms(4, 3, seed=2)[0]
TURNS = [(times, mirrored) for mirrored in (False, True) for times in range(4) if times or mirrored]
TURNS_OF_VOLUMES = {
    "flip": lambda x: x.flip(-3),
    "quarter turn": lambda x: torch.rot90(x, 1, (-3, -2)),
    "half turn": lambda x: torch.rot90(x, 2, (-3, -1)),
    "other order": lambda x: x.permute(0, 1, 3, 4, 2),
    "two axes exchanged": lambda x: x.transpose(-1, -2),
}


def turned(images: Tensor, times: int, mirrored: bool) -> Tensor:
    return torch.rot90(images.flip(-1) if mirrored else images, times, (-2, -1))


def kind(report: PreflightReport) -> str | None:
    return None if report.found is None else report.found.view.kind


@pytest.fixture(scope="module")
def batch_norm_network() -> nn.Module:
    return train(2, "batch", 180)


@pytest.fixture(scope="module")
def instance_norm_network() -> nn.Module:
    return train(2, "instance", 200)


@pytest.fixture(scope="module")
def volume_network() -> nn.Module:
    return train(3, "batch", 160)


@pytest.fixture(params=["batch_norm_network", "instance_norm_network"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    found: nn.Module = request.getfixturevalue(request.param)
    return found


def test_silent_on_images_as_they_are(network: nn.Module, volume_network: nn.Module) -> None:
    for report in (preflight(network, list(SLICES)), preflight(volume_network, list(VOLUMES))):
        assert report.found is None
        assert str(report).startswith("Nothing found")


@pytest.mark.parametrize(("times", "mirrored"), TURNS)
def test_turns_and_flips(network: nn.Module, times: int, mirrored: bool) -> None:
    planted = turned(SLICES, times, mirrored)
    report = preflight(network, list(planted))
    assert report.found is not None
    assert torch.equal(report.found.view.change(planted), SLICES)


@pytest.mark.parametrize("name", TURNS_OF_VOLUMES)
def test_turns_of_volumes(volume_network: nn.Module, name: str) -> None:
    planted = TURNS_OF_VOLUMES[name](VOLUMES)
    report = preflight(volume_network, list(planted))
    assert report.found is not None
    assert torch.equal(report.found.view.change(planted), VOLUMES)


def test_inverted(network: nn.Module, volume_network: nn.Module) -> None:
    assert kind(preflight(network, list(1 - SLICES))) == "inverted"
    assert kind(preflight(volume_network, list(1 - VOLUMES))) == "inverted"


@pytest.mark.parametrize("factor", [0.5, 1.5, 2])
def test_size(batch_norm_network: nn.Module, factor: float) -> None:
    report = preflight(batch_norm_network, list(F.interpolate(SLICES, scale_factor=factor, mode="bilinear")))
    assert report.found is not None
    assert report.found.view.kind == "size"
    assert (report.found.view.enlarges < 1) == (factor > 1)


def test_size_of_volumes(volume_network: nn.Module) -> None:
    report = preflight(volume_network, list(F.interpolate(VOLUMES, scale_factor=0.5, mode="trilinear")))
    assert report.found is not None
    assert report.found.view.enlarges == 2


def test_range(batch_norm_network: nn.Module, instance_norm_network: nn.Module) -> None:
    """A wrong range is seen by BatchNorm; InstanceNorm takes any range, and is asked for neither ranges nor sizes."""
    assert kind(preflight(batch_norm_network, list(255 * SLICES))) == "range"
    report = preflight(instance_norm_network, list(255 * SLICES))
    assert report.found is None
    assert "none of 8 views of your images (turned, inverted) suits" in str(report)
    assert "Not tried: ranges and sizes" in str(report)


class SecondChannel(nn.Module):
    """A network of two channels that looks at the second one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image[:, 1:])
        return logits


def test_channel_order(network: nn.Module) -> None:
    noise = torch.rand(SLICES.shape, generator=torch.Generator().manual_seed(0))
    right = torch.cat([noise, SLICES], dim=1)
    assert preflight(SecondChannel(network), list(right)).found is None
    report = preflight(SecondChannel(network), list(right.flip(1)))
    assert report.found is not None
    assert report.found.view.cure == "`image = image[[1, 0]]`"


class Mirrored(nn.Module):
    """The mean of the logits of an image and its mirror image: a flip of the image flips its output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image) + self.network(image.flip(-1)).flip(-1)
        return logits / 2


def test_no_alarm_for_what_a_network_takes_either_way(network: nn.Module) -> None:
    report = preflight(Mirrored(network), list(SLICES.flip(-1)))
    assert report.found is None
    (mirrored,) = (trial for trial in report.trials if trial.view.looks == "flipped along the last axis")
    assert mirrored.gain == pytest.approx(0, abs=1e-3)


def test_no_alarm_from_a_network_that_finds_nothing() -> None:
    """It is sure of the background in every view, but has no BatchNorm and no foreground to be sure of."""
    network = nn.Conv2d(1, 3, 3, padding=1)
    with torch.no_grad():
        network.weight[:] = torch.rand(network.weight.shape, generator=torch.Generator().manual_seed(0))
        network.bias[:] = torch.tensor([100.0, 0.0, 0.0])
    report = preflight(network, list(SLICES))
    assert report.found is None
    assert all(trial.gain == pytest.approx(0, abs=1e-6) for trial in report.trials)


def test_module_with_two_heads_as_its_network() -> None:
    torch.manual_seed(0)
    network = TinyNet()
    images = [{"image": torch.rand(1, 16, 16)} for _ in range(4)]
    module = APLModule(network, CLASSES)
    plain, whole = preflight(network.eval(), images), preflight(module, images)
    assert module.training
    assert [trial.gain for trial in whole.trials] == pytest.approx([trial.gain for trial in plain.trials], abs=1e-4)


class AuxiliaryFirst(nn.Module):
    """A network that returns the logits of one layer on the image before its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.early = nn.Conv2d(1, 4, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.early(image), self.network(image)]


def test_main_output_is_found(network: nn.Module) -> None:
    plain, both = preflight(network, list(SLICES)), AuxiliaryFirst(network)
    for found in (preflight(both, list(SLICES)), preflight(both, list(SLICES), inferer=lambda image, net: net(image))):
        assert [trial.gain for trial in found.trials] == pytest.approx([trial.gain for trial in plain.trials])
    early = preflight(both, list(SLICES), main_output=0)
    assert max(abs(trial.surer[0]) for trial in early.trials if trial.view.kind == "orientation") < 1e-5


class SomeSizes(nn.Module):
    """A network that takes volumes of some sizes, and returns the logits of one layer on the image before its own."""

    def __init__(self, network: nn.Module, *sizes: int) -> None:
        super().__init__()
        self.network, self.early, self.sizes = network, nn.Conv3d(1, 5, 1), sizes

    def forward(self, image: Tensor) -> list[Tensor]:
        if image.shape[-1] not in self.sizes:
            raise RuntimeError("another size")
        return [self.early(image), self.network(image)]


def test_main_output_of_volumes(volume_network: nn.Module) -> None:
    """Noise of a usual size shows it; a network that does not take such images has to be told."""
    size = VOLUMES.shape[-1]
    flip = preflight(SomeSizes(volume_network, size, 32), [VOLUMES[0]]).trials[0]
    assert flip.gain == pytest.approx(preflight(volume_network, [VOLUMES[0]]).trials[0].gain)
    network = SomeSizes(volume_network, size)
    with pytest.raises(ValueError, match="Expected `main_output`, the index of the main logit map among those"):
        preflight(network, [VOLUMES[0]])
    assert preflight(network, [VOLUMES[0]], main_output=1).trials[0].gain == pytest.approx(flip.gain)


def test_inferer(batch_norm_network: nn.Module) -> None:
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer((32, 32), sw_batch_size=4)
    report = preflight(batch_norm_network, list(SLICES.flip(-2)), inferer=inferer)
    assert report.found is not None
    assert report.found.view.looks == "flipped along the last axis but one"


def test_binary_network_with_one_logit(instance_norm_network: nn.Module) -> None:
    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = instance_norm_network

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            logits: Tensor = self.network(image)
            return {"out": logits[:, 1:2] - logits[:, [0, 2, 3]].logsumexp(dim=1, keepdim=True)}

    planted = torch.rot90(SLICES, 1, (-2, -1))
    report = preflight(Binary(), list(planted))
    assert report.found is not None
    assert torch.equal(report.found.view.change(planted), SLICES)


def test_views_that_a_network_cannot_take_are_named(batch_norm_network: nn.Module) -> None:
    class FixedSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = batch_norm_network

        def forward(self, image: Tensor) -> Tensor:
            if image.shape[-1] != 32:
                raise RuntimeError(f"only images of 32 pixels, not {image.shape[-1]}")
            logits: Tensor = self.network(image)
            return logits

    report = preflight(FixedSize(), list(SLICES.flip(-1)))
    assert kind(report) == "orientation"
    assert "Not tried: " in str(report)
    assert "2 times too small: RuntimeError: only images of 32 pixels, not 64" in str(report)


def test_decision_of_known_gains() -> None:
    """The margin of four parts is half of that of one; three of four parts must gain; the largest gain wins."""
    flip, turn = (view for view in views_of(SLICES)[:2])
    margin = MARGINS["orientation"]

    def trial(view: View, *gains: float, likeness: float | None = None) -> Trial:
        return Trial(view, list(gains), list(gains), likeness)

    assert best_of([trial(flip, 0.99 * margin)], cases=4) is None
    assert best_of([trial(flip, *[0.51 * margin] * 4)], cases=4) is not None
    assert best_of([trial(flip, *[0.49 * margin] * 4)], cases=4) is None
    assert best_of([trial(flip, *[0.99 * margin] * 4)], cases=1) is None, "slices of one patient err alike"
    assert best_of([trial(flip, *[1.01 * margin] * 4)], cases=1) is not None
    assert best_of([trial(flip, 10, 10, -1, -1)], cases=4) is None
    found = best_of([trial(flip, 2, 2, 2, -1), trial(turn, 2, 2, 2, 2), trial(flip, 9, 9, -1, -1)], cases=4)
    assert found is not None
    assert found.view is turn
    assert best_of([], cases=4) is None
    for likeness, least in ((4.0, 1.0), (3.0, 1.0), (2.5, 2.0), (2.0, 3.0)):  # of features that stay unlike training
        assert best_of([trial(flip, 0.99 * least * margin, likeness=likeness)], cases=4) is None
        assert best_of([trial(flip, 1.01 * least * margin, likeness=likeness)], cases=4) is not None
        assert best_of([trial(flip, *[0.51 * margin] * 4, likeness=likeness)], cases=4) is not None, "of four patients"


@pytest.mark.parametrize(("names", "cases"), [(["a"], 1), (["a", "b", "c"], 3), ([None], 32)])
def test_slices_of_one_case_count_once(
    batch_norm_network: nn.Module, monkeypatch: pytest.MonkeyPatch, names: list[str | None], cases: int
) -> None:
    """Without a case, each slice is its own."""
    seen = []
    monkeypatch.setattr("apl_lightning.preflight.run.best_of", lambda trials, cases: seen.append(cases))
    slices = [{"image": SLICES[0], "case": names[n % len(names)]} for n in range(32)]
    preflight(batch_norm_network, slices)
    assert seen == [cases]
    preflight(batch_norm_network, ConcatDataset([slices[:16], slices[16:]]))
    assert seen[1] == min(2 * cases, 32), "patients of one name in two folders are two"


def test_number_of_images(batch_norm_network: nn.Module) -> None:
    """Images are spread over the data set; eight slices make a part, each volume is one."""
    read: list[int] = []

    class Recorded:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Tensor:
            read.append(index)
            return SLICES[index % 16]

    report = preflight(batch_norm_network, Recorded(), max_images=4)
    assert read == [0, 12, 37, 62, 87]
    assert {len(trial.gains) for trial in report.trials} == {1}
    report = preflight(batch_norm_network, Recorded())
    assert {len(trial.gains) for trial in report.trials} == {4}


def test_centre_of_large_volumes() -> None:
    image = torch.arange(14 * 7 * 4.0).view(1, 14, 7, 4)
    assert torch.equal(centre(image, 14 * 7 * 4), image)
    assert torch.equal(centre(image, 4 * 7 * 6), image[:, 4:10, :6])  # the longest axis stays even
    assert torch.equal(centre(image, 4 * 5 * 5), image[:, 5:9, 1:6])
    assert centre(torch.empty(1, 512, 512, 1000), 2**23).shape == (1, 192, 192, 224)


def test_inferer_gets_the_centre_of_a_volume(volume_network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apl_lightning.preflight.run._MOST_OF_A_VOLUME", 16**3)
    seen: set[int] = set()

    def inferer(images: Tensor, model: nn.Module) -> Tensor:
        seen.add(images[0, 0].numel())
        return model(images)

    preflight(volume_network, [torch.cat([VOLUMES[0]] * 3, dim=-1)], inferer=inferer)
    assert 16**3 in seen
    assert max(seen) == 32**3, "of twice the size"


def test_warning_and_picture(batch_norm_network: nn.Module, tmp_path: Path) -> None:
    report = preflight(batch_norm_network, list(torch.rot90(SLICES, 1, (-2, -1))))
    with pytest.warns(UserWarning, match=r"look rotated by 90 degrees counter-clockwise to this network.*torch.rot90"):
        report.warn()
    path = report.picture(tmp_path / "out" / "preflight.png")
    assert path.stat().st_size > 1000
    with pytest.raises(FileExistsError, match="name another one"):
        report.picture(path)
    assert [tuple(shown.labels.shape) for shown in report.as_preferred] == [(32, 32)] * 4
    silent = preflight(batch_norm_network, list(SLICES[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent.warn()
    assert silent.as_preferred == []
    assert silent.picture(tmp_path / "silent.png").exists()


def test_wrong_arguments(batch_norm_network: nn.Module) -> None:
    with pytest.raises(TypeError, match="data set of images, but got 'images': pass a data set"):
        preflight(batch_norm_network, "images")
    with pytest.raises(ValueError, match="the data set is empty"):
        preflight(batch_norm_network, [])
    with pytest.raises(ValueError, match="`max_images` to be at least 1, but got 0"):
        preflight(batch_norm_network, list(SLICES), max_images=0)
    with pytest.raises(ValueError, match=r"return \(B, 7, ...\) logits, but got \(1, 4, 32, 32\).*num_classes=4"):
        preflight(batch_norm_network, list(SLICES), num_classes=7)
    with pytest.raises(ValueError, match=r"`main_output` at least 0 and below 1, the number of logit maps in \(1, 4,"):
        preflight(batch_norm_network, list(SLICES), main_output=1)
    with pytest.raises(ValueError, match="as after a softmax"):
        preflight(nn.Sequential(batch_norm_network, nn.Softmax(dim=1)), list(SLICES))
    broken = nn.Conv2d(1, 2, 1)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match="finite logits, but got NaN"):
        preflight(broken, list(SLICES))

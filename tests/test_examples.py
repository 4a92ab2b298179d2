"""All examples run at a small size; the diff of the existing project has at most eight changed lines."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyNet
from PIL import Image

from apl_lightning import checkpoints

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def test_quickstart(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = example("quickstart").main(["--patients", "8", "--source-epochs", "1", "--epochs", "1", "--out", "out"])
    assert set(rows) == {"before", "after"}
    assert "| before |" in capsys.readouterr().out
    assert (tmp_path / "out" / "panel.png").stat().st_size > 1000


def test_phantoms_share_the_anatomy_of_both_modalities(example: Any) -> None:
    phantom = example("phantom")
    mr, ct = phantom.Phantoms("mr", 3, seed=1), phantom.Phantoms("ct", 3, seed=1)
    for first, second in zip(mr, ct, strict=True):
        assert torch.equal(first["label"], second["label"])
        assert not torch.allclose(first["image"], second["image"], atol=0.1)
        assert first["label"].unique().tolist() == [0, 1, 2, 3, 4]


def write_abdomen(folder: Path) -> Path:
    """Write random volumes in the layout of the real data."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    split = {
        "source_train": ["mr1"],
        "source_val": ["mr2"],
        "target_adapt": ["ct1", "ct2"],
        "target_val": ["ct3"],
    }
    labels = ["background", "liver", "right kidney", "left kidney", "spleen"]
    cases = []
    for patient in (patient for patients in split.values() for patient in patients):
        label = generator.integers(0, 5, (10, 32, 32)).astype(np.uint8)
        image = (label * 40 + generator.integers(0, 30, label.shape)).astype(np.int16)
        np.savez(folder / f"{patient}.npz", image=image, label=label)
        shape = {"shape": list(label.shape), "spacing_zyx_mm": [5.0, 1.5, 1.5]}
        cases.append({"id": patient, "domain": patient[:2], "file": f"{patient}.npz", **shape})
    meta = {"labels": {str(number): name for number, name in enumerate(labels)}, "split": split, "cases": cases}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(("network", "preset"), [("monai-unet", "default"), ("smp-unet", "paper")])
def test_abdomen(example: Any, tmp_path: Path, network: str, preset: str) -> None:
    data = write_abdomen(tmp_path / "data")
    options = ["--data", str(data), "--out", "out", "--size", "32", "--seeds", "0", "--epochs", "1"]
    rows = example("abdomen").main([*options, "--source-epochs", "1", "--network", network, "--preset", preset])
    for column in ("liver", "right kidney", "left kidney", "spleen", "average"):
        before, after, gain = (rows[name][0][column] for name in ("before", "after", "gain"))
        assert gain == pytest.approx(after - before)
    assert json.loads((tmp_path / f"out/results-{preset}-target_val.json").read_text()) == rows
    assert (tmp_path / f"out/picture-{preset}-target_val-0.png").exists()
    assert list((tmp_path / "out/refined-0/overlays").rglob("*.png"))
    with pytest.raises(ValueError, match="the split 'target_test' in .*meta.json, but it has"):
        example("abdomen").main([*options, "--report", "target_test"])


def test_abdomen3d(example: Any, tmp_path: Path) -> None:
    """A second call reads what the first one has saved."""
    options = ["--data", str(write_abdomen(tmp_path / "data")), "--out", "out", "--size", "16", "--seeds", "0"]
    lengths = ["--source-steps", "1", "--steps", "1", "--round-steps", "1", "--patch-size", "8", "16", "16"]
    rows = example("abdomen3d").main([*options, *lengths])
    for column in ("liver", "right kidney", "left kidney", "spleen", "average"):
        before, after, gain = (rows[name][0][column] for name in ("before", "after", "gain"))
        assert gain == pytest.approx(after - before)
    assert {"source-16-8x16x16-1-1.0-0.pt", "refined-16-8x16x16-1-1.0-1-1-0.pt", "table-target_val.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert example("abdomen3d").main([*options, *lengths]) == rows


def test_volume_memory(example: Any) -> None:
    """Each row in this process; the command gives each one of its own."""
    for row in example("volume_memory").ROWS:
        assert example("volume_memory").measure(row, (32, 32, 32), (16, 16, 16)) > 0


def test_methods(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call runs only the missing runs, and the tables match the files."""
    data = write_abdomen(tmp_path / "abdomen")
    options = ["--data", str(data), "--out", "out", "--quick", "--jobs", "1", "--settings", "abdomen-mr-to-ct"]
    options += ["--bases", "remapped"]
    methods = example("methods")
    methods.main([*options, "--methods", "CBST", "APL, defaults"])
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/runs/*.json")}
    assert len(before) == 1 + 2, "the base, two runs"
    methods.main([*options, "--methods", "CBST", "APL, defaults", "threshold + extras"])
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*/runs/*.json")}.items()
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    named = {row["method"] for row in rows if row["base"] == "remapped"}
    assert named == {"none", "CBST", "APL, defaults", "threshold + extras"}
    run = json.loads((out / "abdomen-mr-to-ct/runs/remapped--CBST--0.json").read_text())
    assert [row["after/spleen"] for row in rows if row["method"] == "CBST"] == [str(run["after"]["dice"]["spleen"])]
    assert run["rounds"][-1]["val/dice/average"] == pytest.approx(run["after"]["dice"]["average"])
    (patient,) = run["after"]["patients"].values()
    assert patient["spleen"].keys() == {"dice", "assd", "hd95"}
    assert "## abdomen-mr-to-ct, remapped" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"'size': \(32, 128\)"):
        methods.main(["--data", str(data), "--out", "out", "--bases", "remapped"])


def test_methods_in_the_other_direction(example: Any, tmp_path: Path) -> None:
    data = write_abdomen(tmp_path / "abdomen")
    options = ["--data", str(data), "--out", "out", "--quick", "--jobs", "1", "--settings", "abdomen-ct-to-mr"]
    example("methods").main([*options, "--bases", "remapped", "--methods", "APL, paper settings"])
    assert (tmp_path / "out/abdomen-ct-to-mr/runs/remapped--APL,-paper-settings--0.json").exists()
    with pytest.raises(SystemExit):
        example("methods").main([*options, "--settings", "abdomen"])


def known_run(setting: str, method: str, seed: int, before: float, after: float, **more: Any) -> dict[str, Any]:
    dice = {"liver": after, "average": after}
    patients = {"p": {"liver": {"dice": after, "assd": 2.0, "hd95": None}}}
    return {
        **{"data": setting[0], "setting": setting, "base": "plain", "method": method, "seed": seed, "seconds": 3.0},
        "before": {"dice": {"liver": before, "average": before}},
        "after": {"dice": dice, "patients": patients},
        **more,
    }


def known_rounds(*rows: tuple[float, float]) -> dict[str, Any]:
    names = ("pseudo/estimated_gain", "pseudo/estimated_gain/liver")
    return {"rounds": [{**dict.fromkeys(names, gain), "val/dice/average": dice} for gain, dice in rows]}


def test_report_of_known_runs(example: Any, tmp_path: Path) -> None:
    rounds = {"a-x-to-y": known_rounds((0.1, 62), (0.05, 61)), "b-x-to-y": known_rounds((0.1, 70), (0.09, 72))}
    for setting, of_setting in rounds.items():
        (tmp_path / setting / "runs").mkdir(parents=True)
        last = of_setting["rounds"][-1]["val/dice/average"]
        runs = [
            known_run(setting, "none", 0, 60, 60),
            {**known_run(setting, "none", 0, 80, 80), "base": "oracle"},
            known_run(setting, "X", 0, 60, 62 if setting[0] == "a" else last, **of_setting),
            known_run(setting, "Y", 0, 60, 50, **known_rounds((-0.1, 55), (-0.2, 50))),
        ]
        for number, run in enumerate(runs):
            (tmp_path / setting / "runs" / f"{number}.json").write_text(json.dumps(run))
    text = example("report").write_report(tmp_path)
    # X gains 2 and 12 points, Y loses 10 twice.
    assert "| X | 7.0 | 2 of 2 | 2.0 | a-x-to-y, plain | 0 of 2 | 2.0 | 12.0 |" in text
    assert "| Y | -10.0 | 2 of 2 | -10.0 | a-x-to-y, plain | 2 of 2 | -10.0 | -10.0 |" in text
    assert "| X | 62.0 | 62.0 | 2.0 | 1.0 | 10 % | 2.0 | nan | 3 |" in text
    # In a, the estimates 10, 5, -10, -20 stand for true gains of 2, 1, -5, -10; two differ by more than 2.
    assert "| a | 4 | 1.00 | 2 | 2 | 6.5 |" in text
    # The guard returns to the first round in a, and to what came in from Y.
    assert "| a | 0.75 | 4 x | 2 | 1 | 0 | -4.5 | 1.0 | 200 % |" in text
    assert "| b, chosen on the others | 0.9 | 4 x | 2 | 1 | 0 | 1.0 | 5.0 | 83 % |" in text
    assert "| all, with the defaults | 0.75 | 4 x | 4 | 2 | 0 | -1.8 | 3.5 | 108 % |" in text


def test_drift_of_known_runs(example: Any) -> None:
    def run(dice: float, *rounds: float) -> dict[str, Any]:
        found = known_run("a-x-to-y", "X", 0, 60, dice, **known_rounds(*((0.1, value) for value in rounds)))
        found["after"]["dice"]["spleen"] = 50
        return found

    text = example("drift").table([run(70, 70)], [run(68, 62, 71, 67)])
    assert text.splitlines()[2] == "| a-x-to-y | plain | X | 0 | 60.0 | 70.0 | 68.0 | 71.0 | 3.0 | liver -2.0 |"


def test_batch_norm(example: Any, tmp_path: Path) -> None:
    """The chosen statistics follow from the estimate."""
    data = write_abdomen(tmp_path / "data")
    methods, batch_norm, settings = (example(name) for name in ("methods", "batch_norm", "settings"))
    with pytest.raises(SystemExit):
        methods.main(["--data", str(data), "--out", "out", "--quick", "--settings", "none"])
    for row in batch_norm.main(["--data", str(data), "--out", "out", "--bases", "plain"]):
        source, other, chosen, *held_out = (float(value) for value in row[3:9])
        below = [max(source, other) - chosen, max(held_out[:2]) - held_out[2]]
        assert [float(value) for value in row[10:]] == pytest.approx(below, abs=0.11)
    budget = settings.read_budget(tmp_path / "out")
    setting = settings.settings_of(data, tmp_path / "out", budget)[0]
    network = example("bases").base_network("plain", setting, 0)
    adapted, _ = batch_norm.prepared(network, setting, "adapt")
    chosen, found = batch_norm.prepared(network, setting, "auto")
    gain = found["pseudo/batch_norm_gain"]
    share = 0.0 if gain <= -0.01 else 1.0 if gain >= 0.01 else 0.5
    before, after = (net.state_dict()["model.0.conv.unit0.adn.N.running_var"] for net in (network, adapted))
    assert not torch.equal(before, after)
    mixed = chosen.state_dict()["model.0.conv.unit0.adn.N.running_var"]
    torch.testing.assert_close(mixed, (1 - share) * before + share * after)


def test_few_patients(example: Any, tmp_path: Path) -> None:
    """A network like its base gains nothing, and one that finds nothing loses all."""
    few, methods, settings, bases = (example(name) for name in ("few_patients", "methods", "settings", "bases"))
    assert few.patients_of(["a", "a", "b", "c", "c", "d"], 2) == [[0, 1, 2], [3, 4, 5]]
    data = write_abdomen(tmp_path / "data")
    with pytest.raises(SystemExit):
        methods.main(["--data", str(data), "--out", "out", "--quick", "--settings", "none"])
    for setting in settings.settings_of(data, tmp_path / "out", settings.read_budget(tmp_path / "out")):
        weights = bases.base_network("plain", setting, 0).state_dict()
        (setting.out / "runs").mkdir()
        torch.save(weights, setting.out / "runs" / "plain--same--0.pt")
        last = list(weights)[-1]
        nothing = torch.tensor([1e6] + [0.0] * (len(weights[last]) - 1))
        torch.save({**weights, last: nothing}, setting.out / "runs" / "plain--nothing--0.pt")
    found = few.main(["--data", str(data), "--out", "out", "--bases", "plain", "--patients", "1"])[1]
    assert len(found) == 4
    for (estimate, true), same in zip(found, (False, True, False, True), strict=True):
        assert (estimate, true) == (0, 0) if same else estimate <= 0 and true <= 0
    assert any(true < 0 for _, true in found)


def test_label_pass_benchmark(example: Any) -> None:
    label_pass = example("label_pass")
    options = ["--size", "64", "--images", "2", "--turns", "1"]
    found = label_pass.main([*options, "--rows", "script of CRST"])
    assert list(found) == ["script of CRST"]
    # A new process takes 8 seconds to import, so this one measures the second row.
    found["CBST"] = label_pass.measure("CBST", argparse.Namespace(size=64, images=2, turns=1, threads=1))
    assert all(ratio > 0 and peak > 100 for ratio, peak in found.values())


def test_refinement_never_reads_a_label(example: Any, tmp_path: Path) -> None:
    write_abdomen(tmp_path)
    unlabelled = example("slices").Slices(tmp_path, "target_adapt", size=32, labelled=False)
    assert len(unlabelled) == 20, "all slices, with or without organs"
    assert all(set(unlabelled[index]) == {"image", "case"} for index in range(20))


def test_remapping_changes_intensities(example: Any) -> None:
    training = example("source_training")
    image = torch.rand(4, 1, 24, 24)
    remapped = training.random_remapping(image)
    assert remapped.shape == image.shape
    torch.testing.assert_close(remapped.amin((1, 2, 3)), torch.zeros(4))
    torch.testing.assert_close(remapped.amax((1, 2, 3)), torch.ones(4))
    assert not torch.allclose(remapped, image, atol=0.05)


def test_existing_project_changes_at_most_eight_lines(example: Any) -> None:
    plain, refined = (EXAMPLES / f"existing_project{suffix}.py" for suffix in ("", "_apl"))
    lines = list(
        difflib.unified_diff(
            plain.read_text().splitlines(), refined.read_text().splitlines(), plain.name, refined.name, lineterm=""
        )
    )
    changed = [line for line in lines[2:] if line[0] in "+-"]
    assert len(changed) <= 8
    assert "\n".join(lines) == (ROOT / "docs/existing_project.diff").read_text().rstrip("\n")
    small = ["--patients", "8", "--epochs", "1"]
    assert "val/accuracy" in example("existing_project").main(small)
    assert "val/dice" in example("existing_project_apl").main(small)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # wandb's own
def test_wandb_logging(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = example("wandb_logging").main(["--patients", "8", "--epochs", "1", "--out", "out"])
    assert list(run.glob("*.wandb"))
    assert list(run.rglob("overlays/*.png"))


def test_overhead(example: Any) -> None:
    medians = example("overhead").main(["--size", "32", "--images", "4", "--batch-size", "2", "--turns", "1"])
    assert list(medians) == list(example("overhead").NETWORKS)
    assert all(ratio > 0 for ratio in medians.values())


def test_scaling(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a small network; only the new process that measures memory uses the network of the benchmark."""
    monkeypatch.setattr(example("scaling"), "network", lambda: TinyNet(5))
    options = ["--size", "32", "--images", "4", "--batch-size", "2", "--turns", "1", "--counts", "4"]
    scaling, bare, memory = example("scaling").main(options).values()
    assert set(scaling) == {"label pass", "training step", "plain fine-tuning step"}
    assert set(bare) == {"label pass", "training step"}
    assert all(ratio > 0 for ratio in (*scaling.values(), *bare.values()))
    assert memory["peak with 4 images, MiB"] > 100
    # The store also has an index, which is large relative to tiny images.
    assert 2 <= memory["store, bytes per pixel"] < 4


@pytest.mark.parametrize("translated", [False, True], ids=["network", "translator and network"])
def test_checkpoint_of_another_system(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, translated: bool
) -> None:
    monkeypatch.setattr("apl_lightning.guard.Guard.is_harmed", lambda *_: False)  # these images are noise
    options = {"bounds": (-1.8, 4.4)}
    network = checkpoints.SIFA(5, width=2) if not translated else checkpoints.ResnetGenerator(1, 5, 8, tanh=False)
    system = "synseg" if translated else "sifa-v1"
    torch.save(network.state_dict(), tmp_path / "model.pth")
    (tmp_path / "images").mkdir()
    volume = np.random.default_rng(0).integers(0, 255, (3, 64, 64)).astype(np.uint8)
    np.save(tmp_path / "images" / "volume.npy", volume)
    Image.fromarray(volume[0]).save(tmp_path / "images" / "slice.png")
    more = ["--bounds", "-1.8", "4.4"]
    if translated:
        torch.save(checkpoints.ResnetGenerator(1, 1, 8).state_dict(), tmp_path / "latest_net_G_B.pth")
        more = ["--no-tanh", "--translator", "latest_net_G_B.pth"]
    refined = example("refine_checkpoint").main([system, "model.pth", "--images", "images", "--epochs", "1", *more])
    if translated:
        assert isinstance(refined, checkpoints.Translated)
        assert not any(isinstance(layer, torch.nn.Tanh) for layer in refined.segmenter.modules())
        options = {"prefix": "segmenter.", "tanh": False}
    else:
        assert refined.bounds == (-1.8, 4.4)
    again = checkpoints.load(system, tmp_path / "refined.pth", **options)
    assert list(again.state_dict()) == list(network.state_dict())
    assert any(not torch.equal(value, network.state_dict()[name]) for name, value in again.state_dict().items())


def test_folder_without_images_is_an_error(example: Any, tmp_path: Path) -> None:
    torch.save(checkpoints.ResnetGenerator(1, 5, 8).state_dict(), tmp_path / "model.pth")
    with pytest.raises(SystemExit, match="but found none"):
        example("refine_checkpoint").main(["synseg", "model.pth", "--images", str(tmp_path)])

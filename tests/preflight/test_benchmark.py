"""The benchmark runs from nothing, and its table counts as by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("preflight")


def test_from_nothing(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = {"source_train": ["a1"], "source_val": ["a2"], "target_adapt": ["b1"], "target_val": ["b2"]}
    cases = []
    for number, (patient,) in enumerate(split.values()):
        label = np.random.default_rng(number).integers(0, 2, (9, 16, 16)).astype(np.uint8)
        np.savez(tmp_path / f"{patient}.npz", image=label * 100, label=label)
        shape = {"shape": list(label.shape), "spacing_zyx_mm": [1.0, 1.0, 1.0]}
        cases.append({"id": patient, "domain": patient[0], "file": f"{patient}.npz", **shape})
    labels = {"0": "background", "1": "organ"}
    (tmp_path / "meta.json").write_text(json.dumps({"labels": labels, "split": split, "cases": cases}))
    folders = ["--data", str(tmp_path), "--methods", str(tmp_path / "methods"), "--out", str(tmp_path / "out")]
    chosen = ["--bases", "plain", "--methods", "threshold", "--quick"]
    importlib.import_module("methods").main([*folders[:2], "--out", folders[3], *chosen])
    text = benchmark.main([*folders, "--volumes", "1", "--folds", "2"])
    assert text in capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() == text + "\n"
    rows = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert len(rows) == 2 * 2 * 7
    # Each patient is held out once: the source volumes of the two folds are of both patients of a modality.
    assert {row["case"] for row in rows if row["domain"] == "source"} == {"a1", "a2", "b1", "b2"}
    with pytest.raises(SystemExit, match="pass fewer --folds"):
        benchmark.main([*folders, "--folds", "3"])
    planted = [row for row in rows if row["domain"] == "source" and row["planted"]]
    assert all(any(trial["right"] for trial in row["trials"]) for row in planted)


def row(planted: str, domain: str, right: float, wrong: float, data: str = "x") -> dict[str, Any]:
    views = [(wrong, False), *([(right, True)] if planted else [])]
    trials = [
        {"kind": "orientation", "gains": [gain], "surer": [gain], "likeness": 4.0, "right": undoes}
        for gain, undoes in views
    ]
    return {
        "data": data,
        "setting": f"{data}-a-to-b",
        "domain": domain,
        "planted": planted,
        "kind": "",
        "trials": trials,
    }


def test_table_of_known_rows(benchmark: Any) -> None:
    report = importlib.import_module("preflight_report")
    turns = [row("turn or flip", "source", *gains) for gains in ((2, 1), (1, 2), (0.3, 0.1), (0.9, 0))]
    clean = [row("", "target", 0, gain) for gain in (0.9, 0.1, -1, -2)]
    text = report.volumes_table(turns + clean)
    # Two of four turns are found: the second volume has a better wrong view, the third is below the margin of 0.6.
    assert text.splitlines()[2].startswith("| x-a-to-b | default | 50 % of 4 |")
    assert text.splitlines()[2].endswith("| 25 % of 4 | 0 % of 0 |")
    assert report.chosen_margins(clean)["orientation"] == 0.9

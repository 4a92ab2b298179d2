"""The tutorial runs, and the page shows what it writes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/tutorial.md").read_text()
WRITTEN = {"labels.png", "guard.png", "guard.txt", "dice.png", "dice.txt"}


def test_tutorial_runs_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    tutorial = importlib.import_module("tutorial")
    rows = tutorial.main(["--patients", "8", "--source-epochs", "1", "--epochs", "1", "--out", "out"])
    assert len(rows) == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN


def test_page_shows_what_the_tutorial_writes() -> None:
    shown = set(re.findall(r"tutorial/(\w+\.(?:png|txt))", PAGE))
    assert shown == WRITTEN
    assert all((ROOT / "docs/tutorial" / name).exists() for name in shown)


def test_page_shows_every_section() -> None:
    sections = re.findall(r"\[start:(\w+)\]", (ROOT / "examples/tutorial.py").read_text())
    assert re.findall(r"examples/tutorial\.py:(\w+)", PAGE) == sections

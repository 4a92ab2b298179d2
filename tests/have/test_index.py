"""The table of all pages counts their lines and names their tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page import PAGES

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| \[.*?\]\((.*?)\) \| (\d+).*? \| `(.*?)`", (PAGES / "index.md").read_text(), re.MULTILINE)
ELSEWHERE = {
    "../index.md": "README.md",  # which it includes
    "../project.md": "docs/existing_project.diff",  # likewise
}


def code(path: Path) -> str:
    """The blocks of Python on a page, with included YAML files; or the changed lines of a diff."""
    text = re.sub(r'--8<-- "(\S+yaml)"', lambda found: (ROOT / found[1]).read_text(), path.read_text())
    if path.suffix == ".diff":
        return "\n".join(re.findall(r"^[+-](?![+-]{2}).*", text, re.MULTILINE))
    return "\n".join(re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize(("page", "lines", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_lines_and_test_of_a_page(page: str, lines: str, test: str) -> None:
    path = ROOT / ELSEWHERE.get(page, f"docs/have/{page}")
    assert len([line for line in code(path).splitlines() if line.strip()]) == int(lines)
    assert path.stem in (ROOT / test).read_text()


def test_every_page_is_in_the_table() -> None:
    pages = {path.name for path in PAGES.glob("*.md")} - {"index.md", "onnx.md"}
    assert pages == {page for page, _, _ in ROWS} - set(ELSEWHERE)
    assert len(ROWS) == 10

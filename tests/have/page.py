"""The code of a page "I have ..."."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs/have"


def code_of(name: str) -> str:
    """The one block of Python on a page, which has at most 15 lines."""
    (code,) = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    return str(code)


def short(code: str) -> str:
    """Runs of 2 epochs of 2 steps."""
    return re.sub(r"max_epochs=\d+", "max_epochs=2", re.sub(r"steps_per_epoch=\d+", "steps_per_epoch=2", code))

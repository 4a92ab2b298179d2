"""The code and the links of the README work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import Images, TinyNet

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_snippet_refines_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = TinyNet(classes=5)
    labelled = [(torch.rand(1, 16, 16), torch.randint(5, (16, 16))) for _ in range(2)]
    exec(code, {"model": model, "target_images": Images(3), "labelled": labelled})
    refined = torch.load(tmp_path / "refined.pt", weights_only=True)
    assert list(refined) == list(model.state_dict())
    assert any(not torch.equal(refined[name], value) for name, value in model.state_dict().items())


def test_links_point_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target

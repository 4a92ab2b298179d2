"""Networks that are loaded from the systems' file formats reproduce outputs of the official code."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_files import Golden
from golden_errors import FIXTURES, errors

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("name", FIXTURES)
def test_official_outputs(name: str, tmp_path: Path) -> None:
    tolerance = FIXTURES[name][2]
    for key, value in errors(name, tmp_path).items():
        assert value < (1e-4 if "translated" in key else tolerance), (key, value)


@pytest.mark.parametrize("name", ["advent", "sifa_v2", "synseg_fork_seg_ngf32"])
def test_weights_match_their_digest(name: str) -> None:
    golden = Golden(name)
    assert golden.digest() == golden.facts["fill"]["sha256"]

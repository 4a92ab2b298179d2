"""Paper settings contain the equations alone, and the benchmark gives other methods all defaults of APL."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from conftest import CLASSES, TinyNet

from apl_lightning import PAPER, APLModule, PseudoLabelCallback, SelfTrainingModule, TargetDataModule
from apl_lightning.losses import consistency_loss, mean_over_heads, weighted_cross_entropy


def test_paper_settings_have_the_losses_of_the_paper() -> None:
    torch.manual_seed(0)
    module = APLModule(TinyNet(), CLASSES, **PAPER.module)
    image, labels, weights = torch.rand(2, 1, 8, 8), torch.randint(CLASSES, (2, 8, 8)), torch.rand(2, 8, 8)
    main, aux = module.model(image)
    expected = consistency_loss(main, aux) + mean_over_heads(
        lambda logits: weighted_cross_entropy(logits, labels, weights), main, aux
    )
    found = module.losses({"image": image, "pseudo_label": labels, "weight": weights})["loss"]
    torch.testing.assert_close(found, expected)
    assert module.dropout
    assert module.teacher is None
    assert module.batch_norm == "frozen"


def test_extras_of_the_benchmark_are_the_defaults_of_apl(example: Any) -> None:
    extras = example("recipes").EXTRAS
    defaults = {name: parameter.default for name, parameter in inspect.signature(APLModule).parameters.items()}
    assert extras == {name: defaults[name] for name in extras}
    # The rest is the same in all modules, or about the losses of APL.
    own = {"consistency_weight", "refinement_weight", "weighting", "head_rate"}
    others = inspect.signature(SelfTrainingModule).parameters
    differ = {name for name in others if name in defaults and defaults[name] != others[name].default}
    assert differ == set(extras)
    assert set(defaults) - set(others) == own


def test_page_shows_the_defaults_and_the_paper_settings() -> None:
    page = (Path(__file__).parents[1] / "docs" / "choices.md").read_text()
    rows = re.findall(r"^\| [\w ]+ \| `(\w+)\((\w+)=\)` \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    parts: dict[str, tuple[Any, Any]] = {
        "APLModule": (APLModule, PAPER.module),
        "PseudoLabelCallback": (PseudoLabelCallback, PAPER.callback),
        "TargetDataModule": (TargetDataModule, PAPER.data),
    }
    assert len(rows) == 10
    for kind, option, default, paper in rows:
        owner, preset = parts[kind]
        assert preset[option] == ast.literal_eval(paper.strip("`")), option
        if option != "ignore_small_components":  # the default depends on the denoiser
            found = ast.literal_eval(default.split(" with")[0].strip("`"))
            assert inspect.signature(owner).parameters[option].default == found, option

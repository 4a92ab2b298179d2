"""The warm-up of a new second head."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import CLASSES, TinyNet

from apl_lightning import add_dual_heads
from apl_lightning.heads import warm_up_second_head


def test_network_in_training_mode() -> None:
    model = add_dual_heads(TinyNet(), CLASSES, aux="fresh").train()
    before = copy.deepcopy(model.state_dict())
    warm_up_second_head(model, [torch.rand(4, 1, 16, 16)], steps=2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"second.weight", "second.bias", "warm"}, "no BatchNorm statistics"
    assert model.network.encoder[1].training


def test_learning_rate_falls_to_0(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    warm_up_second_head(add_dual_heads(TinyNet(), CLASSES, aux="fresh"), [torch.rand(4, 1, 8, 8)], steps=4, lr=0.01)
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_half_precision_does_not_change_it() -> None:
    model, images = add_dual_heads(TinyNet(), CLASSES, aux="fresh"), [torch.rand(4, 1, 16, 16)]
    half = copy.deepcopy(model)
    warm_up_second_head(model, images, steps=3)
    with torch.autocast("cpu", torch.float16):
        warm_up_second_head(half, images, steps=3)
    assert all(torch.equal(value, half.state_dict()[name]) for name, value in model.state_dict().items())


def test_images_that_cannot_be_read_again() -> None:
    model = add_dual_heads(TinyNet(), CLASSES, aux="fresh")
    with pytest.raises(ValueError, match="can be read again .* pass a list or a loader, not a generator"):
        warm_up_second_head(model, (torch.rand(2, 1, 8, 8) for _ in range(2)), steps=3)

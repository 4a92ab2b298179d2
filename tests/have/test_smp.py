"""segmentation-models-pytorch: one logit, labels to ignore, and `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from page import code_of, short
from torch import Tensor


def unet() -> Any:
    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=1).eval()


def dice(prediction: Tensor, label: Tensor) -> float:
    """Of the foreground, over the pixels with a known label."""
    known = label != 255
    ours, theirs = prediction[known] == 1, label[known] == 1
    return float(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = unet()
    torch.save({"state_dict": {f"model.{name}": value for name, value in source.state_dict().items()}}, "source.pt")
    images, labels = torch.rand(4, 1, 32, 32), torch.randint(2, (4, 32, 32))
    labels[:, :12] = 255
    labelled = list(zip(images, labels, strict=True))
    scope: dict[str, Any] = {"target_images": list(images), "labelled": labelled}
    exec(short(code_of("smp")), scope)
    refined = unet()
    refined.load_state_dict(torch.load("refined.pt", weights_only=True))
    with torch.no_grad():
        before, after = source(images), refined(images)
    assert after.shape == (4, 1, 32, 32)
    assert not torch.allclose(before, after, atol=1e-4)
    (scores,) = scope["trainer"].validate(scope["module"], scope["data"], verbose=False)
    expected = [dice(z[0] > 0, label) for z, label in zip(after, labels, strict=True)]
    assert scores["val/dice/1"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert scores["val/dice"] == scores["val/dice/1"]  # the background does not count
    scope["module"].export().save_pretrained("folder")
    with torch.no_grad():
        assert torch.equal(smp.from_pretrained("folder").eval()(images), after)

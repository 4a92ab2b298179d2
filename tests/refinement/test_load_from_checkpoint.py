"""`load_from_checkpoint`: the network is passed, everything else comes from the file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, Images, TinyNet

from apl_lightning import APLModule, PseudoLabelCallback, SelfTrainingModule, TargetDataModule, TentModule

KINDS = [APLModule, SelfTrainingModule, TentModule]


@pytest.fixture(params=KINDS)
def saved(request: Any, tmp_path: Path, trainer: Any) -> Any:
    """A trained module with options of its own, and the path of its checkpoint."""
    options = {"consistency_weight": 0.3, "weighting": "none"} if request.param is APLModule else {}
    names = ["background", "a", "b"]
    module = request.param(TinyNet(), CLASSES, names, learning_rate=0.01, ema_decay=0.5, **options)
    run = trainer(max_epochs=2, callbacks=[PseudoLabelCallback()])
    run.fit(module, TargetDataModule(Images(6), batch_size=2, store_dir=tmp_path / "labels"))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    return module.eval(), tmp_path / "saved.ckpt"


def test_outputs_export_and_options_are_those_of_the_saved_module(saved: Any) -> None:
    module, path = saved
    other = TinyNet()
    assert not torch.equal(other.classifier.weight, module.model.network.classifier.weight)
    loaded = type(module).load_from_checkpoint(path, model=other).eval()
    image = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded(image), module(image), strict=True))
        assert torch.equal(loaded.export().eval()(image), module.export().eval()(image))
    assert loaded.hparams == module.hparams
    assert dict(loaded.hparams)["ema_decay"] == 0.5
    for name in ("class_names", "learning_rate", "batch_norm", "keys", *module.hparams.keys() & vars(module).keys()):
        assert getattr(loaded, name) == getattr(module, name)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_network(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"got no `model`: call {kind.__name__}.load_from_checkpoint\(path, model="):
        kind.load_from_checkpoint(tmp_path / "any.ckpt")


def test_call_on_an_instance_is_an_error(tmp_path: Path) -> None:
    """It would return another module, and the instance would stay as it is."""
    module = APLModule(TinyNet(), CLASSES)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(tmp_path / "any.ckpt", model=TinyNet())

"""The `Denoiser` base class: default hooks, errors for misspelt hooks, wrapping of plain functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from apl_lightning import PseudoLabelCallback, denoisers
from apl_lightning.denoisers import DatasetDenoiser, Denoiser, Predictor, as_denoiser, denoise
from apl_lightning.losses import weighted_cross_entropy

SHIPPED = ["APL", "BDL", "CBST", "CRST", "Chebyshev", "DPL", "IAST", "MRNet", "Threshold", "UPL"]


def plain(p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
    weights, labels = p_main.max(dim=1)
    return labels, weights


class Plain(Denoiser):
    def __call__(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        return plain(p_main, p_aux)


def test_hooks_have_defaults() -> None:
    class Network(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, 2 * images

    denoiser, images = Plain(), torch.randn(2, 3, 4, 4)
    denoiser.begin(0, 3, torch.device("cpu"))
    p_main, p_aux = denoiser.predict(Predictor(Network()), images)
    torch.testing.assert_close(p_main, images.softmax(1))
    torch.testing.assert_close(p_aux, (2 * images).softmax(1))
    labels, weights = denoiser(p_main, p_aux)
    expected = sum(weighted_cross_entropy(z, labels, weights) for z in (images, 2 * images)) / 2
    torch.testing.assert_close(denoiser.loss(images, 2 * images, labels, weights), expected)
    assert denoiser.state_dict() == {}
    denoiser.load_state_dict({})


def test_call_of_a_dataset_denoiser_is_an_error() -> None:
    """A label pass would not use it."""
    with pytest.raises(TypeError, match="Expected Mine to override `observe` and `decide`, but got `__call__`"):

        class Mine(denoisers.CBST):
            def __call__(self, *predictions: Tensor) -> Any: ...


def test_misspelt_hook_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"among \['begin', 'load_state_dict', 'loss', 'predict'.* but got 'beginn'"):
        type("Misspelt", (Plain,), {"beginn": lambda self, *_: None})
    with pytest.raises(TypeError, match="but got 'observe'.*inherit from `DatasetDenoiser`"):
        type("NoDataset", (Plain,), {"observe": lambda self, *_: ()})
    for kind in (staticmethod, classmethod, property):
        with pytest.raises(TypeError, match="but got 'losss'"):
            type("Decorated", (Plain,), {"losss": kind(lambda *_: None)})
    with pytest.raises(TypeError, match="abstract"):
        type("HalfDone", (DatasetDenoiser,), {"observe": lambda self, *_: ()})()
    type("Helper", (Plain,), {"_helper": lambda self: None})
    mixin = type("Mixin", (), {"other": lambda self: None})
    type("Mixed", (mixin, Plain), {"begin": lambda self, *_: None, "other": lambda self: None})


def test_a_function_is_wrapped_once() -> None:
    p = torch.rand(1, 3, 5).softmax(1)
    callback = PseudoLabelCallback(plain)
    assert isinstance(callback.denoiser, Denoiser)
    assert as_denoiser(callback.denoiser) is callback.denoiser
    for found, expected in zip(callback.denoiser(p, p), plain(p, p), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(denoise(plain, [(p, p)])[0][0], plain(p, p)[0])
    with pytest.raises(ValueError, match="at least one batch of predictions, but got none"):
        denoise(plain, [])


@pytest.mark.parametrize("method", [Plain, 3, "APL", type("Old", (), {"__call__": plain, "begin": plain})()])
def test_other_objects_are_refused(method: Any) -> None:
    with pytest.raises(TypeError, match=r"a `Denoiser` or a plain function .* inherits from `apl_lightning.denois"):
        PseudoLabelCallback(method)


def test_calling_a_dataset_denoiser_treats_the_batch_as_the_data_set() -> None:
    p = (torch.randn(2, 3, 6, 6) * 3).softmax(1)
    for denoiser in (denoisers.CBST(), denoisers.BDL(), denoisers.IAST()):
        denoiser.begin(0, 3, torch.device("cpu"))
        labels, weights = denoiser(p, p)
        [(expected, expected_weights)] = denoise(denoiser, [(p, p)])
        assert torch.equal(labels, expected)
        assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("name", SHIPPED)
def test_jsonargparse_makes_every_denoiser(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PseudoLabelCallback, "labels")
    config = parser.parse_object({"labels": {"denoiser": {"class_path": f"apl_lightning.denoisers.{name}"}}})
    assert type(parser.instantiate(config).labels.denoiser) is getattr(denoisers, name)


def test_mypy_accepts_every_denoiser(tmp_path: Path) -> None:
    script, config = tmp_path / "script.py", tmp_path / "mypy.ini"
    made = [f"PseudoLabelCallback(denoiser=denoisers.{name}())" for name in SHIPPED]
    made += ["PseudoLabelCallback(denoiser=lambda p, q: (p.argmax(1), q[:, 0]))", "PseudoLabelCallback(denoiser=3)"]
    script.write_text("\n".join(["from apl_lightning import PseudoLabelCallback, denoisers", *made, ""]))
    # The types of large packages take a minute, and none is asked for here.
    skipped = ",".join(
        f"{package}.*" for package in ("torch", "pytorch_lightning", "lightning", "numpy", "scipy", "monai")
    )
    config.write_text(
        f"[mypy]\n[mypy-{skipped}]\nfollow_imports = skip\nignore_missing_imports = True\n"
        "[mypy-apl_lightning.*]\nignore_errors = True\n"
    )
    options = ["--config-file", str(config), "--cache-dir", str(tmp_path / "cache"), str(script)]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    found = checked.stdout.splitlines()
    assert found[0].startswith(f'{script}:{1 + len(made)}: error: Argument "denoiser"')
    assert found[-1].startswith("Found 1 error in 1 file"), checked.stdout


@pytest.mark.parametrize(
    ("p_main", "p_aux", "message"),
    [
        (torch.randn(1, 3, 4), torch.randn(1, 3, 4), "sum to 1 over the classes, .* pass `logits.softmax"),
        (torch.full((1, 2, 4), torch.nan), torch.full((1, 2, 4), 0.5), "sum to 1 over the classes"),
        (torch.full((1, 2, 4), 0.5), torch.ones(1, 1, 4), r"one shape .* but got \(1, 2, 4\) and \(1, 1, 4\)"),
    ],
    ids=["logits", "NaN", "other shapes"],
)
def test_denoise_takes_probabilities(p_main: Tensor, p_aux: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoise(denoisers.APL(), [(p_main, p_aux)])


def test_heads_that_return_probabilities_are_refused() -> None:
    class Softmaxed(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images.softmax(1), images.softmax(1)

    with pytest.raises(ValueError, match="Expected Softmaxed to return logits, but got probabilities"):
        Predictor(Softmaxed())(torch.randn(2, 3, 4, 4))

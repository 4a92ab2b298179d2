"""Labels and weights of APL compared with a naive implementation of Eq. 3."""

from __future__ import annotations

import pytest
import torch

from apl_lightning.denoisers import APL


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 5, 3, 4), (1, 3, 2, 3, 4)])
@pytest.mark.parametrize(("aux_weight", "temperature"), [(1.0, 1.0), (0.5, 1.0), (0.0, 3.0), (1.0, 2.0)])
def test_equals_the_equation(shape: tuple[int, ...], aux_weight: float, temperature: float) -> None:
    z_main, z_aux = torch.randn(shape) * 3, torch.randn(shape) * 3
    labels, weights = APL(aux_weight, temperature)(z_main.softmax(1), z_aux.softmax(1))
    merged = (z_main / temperature).softmax(1) + aux_weight * (z_aux / temperature).softmax(1)
    top = (merged / (1 + aux_weight)).topk(2, dim=1)
    assert torch.equal(labels, top.indices[:, 0])
    torch.testing.assert_close(weights, top.values[:, 0] - top.values[:, 1], atol=1e-5, rtol=1e-4)


def test_saturated_and_tied_probabilities() -> None:
    sure, torn = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1), torch.tensor([0.5, 0.5, 0.0]).view(1, 3, 1)
    for temperature in (1.0, 4.0):
        assert APL(temperature=temperature)(sure, sure)[1].item() == pytest.approx(1)
        assert APL(temperature=temperature)(torn, torn)[1].item() == pytest.approx(0)


def test_bad_options_are_an_error() -> None:
    with pytest.raises(ValueError, match="`aux_weight` to be at least 0, but got -1"):
        APL(aux_weight=-1)
    with pytest.raises(ValueError, match="`temperature` to be above 0, but got 0"):
        APL(temperature=0)

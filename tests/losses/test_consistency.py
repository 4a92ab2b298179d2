"""L_Con compared with a naive implementation of the equations and with hand-computed values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apl_lightning.losses import consistency_loss

SHAPES = [(2, 3, 7), (2, 5, 6, 5), (3, 2, 3, 4, 5)]


def naive_consistency(main: Tensor, aux: Tensor, weighting: str) -> float:
    """Eq. 1 and 2 in loops over pixels."""
    batch, classes = main.shape[:2]
    p_main, p_aux = main.softmax(1).flatten(2), aux.softmax(1).flatten(2)
    pixels = p_main.shape[2]
    total = 0.0
    for image in range(batch):
        weight = [[0.0] * classes for _ in range(classes)]
        soft = [[0.0] * classes for _ in range(classes)]
        for n in range(pixels):
            weight[int(p_main[image, :, n].argmax())][int(p_aux[image, :, n].argmax())] += 1
            for i in range(classes):
                for j in range(classes):
                    soft[i][j] += float(p_main[image, i, n] * p_aux[image, j, n]) / pixels
        if weighting == "none":
            weight = [[1.0] * classes for _ in range(classes)]
        elif weighting == "inverse":
            weight = [[1 / (1 + count) for count in row] for row in weight]
        if weighting != "none":
            norm = sum(map(sum, weight))
            weight = [[value / norm for value in row] for row in weight]
        for i in range(classes):
            for j in range(classes):
                if i == j:
                    continue
                if weighting == "product":
                    total += sum(weight[i][k] * soft[k][j] for k in range(classes))
                else:
                    total += weight[i][j] * soft[i][j]
    return total / batch


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighting", ["confusion", "none", "inverse", "product"])
def test_consistency_equals_the_loop_over_pixels(shape: tuple[int, ...], weighting: str) -> None:
    main, aux = torch.randn(shape, dtype=torch.float64) * 2, torch.randn(shape, dtype=torch.float64) * 2
    assert consistency_loss(main, aux, weighting).item() == pytest.approx(naive_consistency(main, aux, weighting))


@pytest.mark.parametrize("weighting", ["confusion", "none", "inverse", "product"])
def test_consistency_ignores_images_of_weight_0(weighting: str) -> None:
    main, aux = torch.randn(3, 4, 9), torch.randn(3, 4, 9)
    some = consistency_loss(main, aux, weighting, torch.tensor([True, False, True]))
    torch.testing.assert_close(some, consistency_loss(main[::2], aux[::2], weighting))
    assert consistency_loss(main, aux, weighting, torch.zeros(3)) == 0


def test_hand_computed_consistency() -> None:
    # Two pixels: p_m = (.8, .2), (.4, .6) and p_a = (.7, .3), (.9, .1). The heads predict (0, 0) and (1, 0), so
    # W_00 = W_10 = 1/2.
    # A_10 = (.2 * .7 + .6 * .9) / 2 = .34, so L = .17.
    p_main = torch.tensor([[[0.8, 0.4], [0.2, 0.6]]])
    p_aux = torch.tensor([[[0.7, 0.9], [0.3, 0.1]]])
    assert consistency_loss(p_main.log(), p_aux.log()).item() == pytest.approx(0.17)


@pytest.mark.parametrize("shape", SHAPES)
def test_unweighted_consistency_is_the_closed_form(shape: tuple[int, ...]) -> None:
    main, aux = torch.randn(shape), torch.randn(shape)
    closed = 1 - (main.softmax(1) * aux.softmax(1)).sum(1).mean()
    torch.testing.assert_close(consistency_loss(main, aux, "none"), closed)


@pytest.mark.parametrize("weighting", ["confusion", "none", "inverse", "product"])
def test_consistency_does_not_depend_on_size_or_batch(weighting: str) -> None:
    main, aux = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6)
    once = consistency_loss(main, aux, weighting)
    torch.testing.assert_close(consistency_loss(main.repeat(3, 1, 1, 1), aux.repeat(3, 1, 1, 1), weighting), once)
    if weighting != "inverse":  # only 1 / (1 + count) depends on the number of pixels
        torch.testing.assert_close(consistency_loss(main.repeat(1, 1, 2, 2), aux.repeat(1, 1, 2, 2), weighting), once)


def test_confusion_weight_has_no_gradient() -> None:
    main, aux = torch.randn(1, 3, 5, requires_grad=True), torch.randn(1, 3, 5)
    consistency_loss(main, aux).backward()
    p_main, p_aux = main.detach().softmax(1), aux.softmax(1)
    weight = torch.zeros(3, 3)
    for n in range(5):
        weight[p_main[0, :, n].argmax(), p_aux[0, :, n].argmax()] += 1 / 5
    weight.fill_diagonal_(0)
    constant = main.detach().requires_grad_()
    (weight * (constant.softmax(1)[0] @ p_aux[0].T / 5)).sum().backward()
    torch.testing.assert_close(main.grad, constant.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    main, aux = (torch.randn(2, 5, 64, 64) * 20).to(dtype), (torch.randn(2, 5, 64, 64) * 20).to(dtype)
    half = consistency_loss(main, aux)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, consistency_loss(main.float(), aux.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["confusion", "none", "inverse", "product"])
def test_consistency_is_the_same_under_autocast(dtype: torch.dtype, weighting: str) -> None:
    torch.manual_seed(0)
    main = torch.full((1, 3, 320, 320), -4.0)  # a sum of 1 over all pixels is above the largest float16
    main[:, 0] = 4.0
    aux = main + torch.randn_like(main)
    with torch.autocast("cpu", dtype):
        found = consistency_loss(main, aux, weighting)
    torch.testing.assert_close(found, consistency_loss(main, aux, weighting))


def test_bad_input_is_an_error() -> None:
    logits = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match=r"one shape \(B, C, \*S\), but got \(1, 3, 4\) and \(1, 2, 4\)"):
        consistency_loss(logits, logits[:, :2])
    with pytest.raises(ValueError, match=r"Expected `weighting` to be one of .*'confusion'.* but got 'entropy'"):
        consistency_loss(logits, logits, "entropy")  # type: ignore[arg-type]

"""Each denoiser compared with a naive implementation in loops, sorted lists and numpy."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apl_lightning import APLModule
from apl_lightning.denoisers import (
    BDL,
    CBST,
    CRST,
    DPL,
    IAST,
    UPL,
    Chebyshev,
    DatasetDenoiser,
    MRNet,
    Predictor,
    Threshold,
    denoise,
)
from apl_lightning.denoisers.confidence import class_logits, predicted

CLASSES = 4
NEAR = 0.002  # tolerance of a threshold from the histogram relative to the sorted list


def batches(count: int = 12, sharpness: float = 3.0) -> list[tuple[Tensor, Tensor]]:
    """Probabilities of two heads for batches of two images."""
    made = []
    for _ in range(count):
        logits = torch.randn(2, CLASSES, 24, 24) * sharpness
        made.append(((logits).softmax(1), (logits + torch.randn_like(logits)).softmax(1)))
    return made


def flat(values: list[tuple[Tensor, Tensor]]) -> np.ndarray[Any, Any]:
    """The mean probabilities of all pixels, (N, C)."""
    return torch.cat([((m + a) / 2).movedim(1, -1).reshape(-1, m.shape[1]) for m, a in values]).double().numpy()


def decided(values: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    labels, weights = (torch.cat([pair[part].flatten() for pair in values]).numpy() for part in (0, 1))
    return labels, weights


def assert_equal_away_from_threshold(weights: Any, expected: Any, distance: Any) -> None:
    """Compare weights except at pixels whose confidence is close to the threshold."""
    away = np.abs(distance) > NEAR
    assert away.mean() > 0.9
    np.testing.assert_array_equal(weights[away], expected[away])


def test_threshold() -> None:
    data = batches()
    p = flat(data)
    labels, weights = decided(denoise(Threshold(0.8), data))
    np.testing.assert_array_equal(labels, p.argmax(1))
    assert_equal_away_from_threshold(weights, (p.max(1) > 0.8).astype(float), p.max(1) - 0.8)
    assert decided(denoise(Threshold(0.0), data))[1].all()


def test_threshold_is_strict() -> None:
    p = torch.tensor([[[0.5], [0.5]]])
    assert Threshold(0.5)(p, p)[1].item() == 0


@pytest.mark.parametrize("normalise", ["kept", "all"])
def test_threshold_divides_by_kept_or_by_all(normalise: Any) -> None:
    logits, labels = torch.randn(1, 3, 4), torch.tensor([[0, 1, 2, 0]])
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    losses = [-logits.log_softmax(1)[0, labels[0, n], n].item() for n in (0, 2)]
    loss = Threshold(normalise=normalise).loss(logits, logits, labels, weights)
    assert loss.item() == pytest.approx(sum(losses) / (2 if normalise == "kept" else 4))


@pytest.mark.parametrize("tau", [0.9, 0.6])
def test_bdl(tau: float) -> None:
    data = batches()
    p = flat(data)
    label, confidence = p.argmax(1), p.max(1)
    theta = np.array([min(np.median(confidence[label == c]), tau) for c in range(CLASSES)])
    denoiser = BDL(tau)
    labels, weights = decided(denoise(denoiser, data))
    np.testing.assert_array_equal(labels, label)
    np.testing.assert_allclose(denoiser.thresholds.sigmoid(), theta, atol=NEAR)
    assert_equal_away_from_threshold(weights, (confidence >= theta[label]).astype(float), confidence - theta[label])


def naive_cbst(p: np.ndarray[Any, Any], portion: float) -> np.ndarray[Any, Any]:
    label, confidence = p.argmax(1), p.max(1)
    theta = np.ones(p.shape[1])
    for c in range(p.shape[1]):
        ordered = sorted(confidence[label == c], reverse=True)
        rank = math.floor(len(ordered) * portion)
        if rank:
            theta[c] = ordered[rank - 1]
    return theta


@pytest.mark.parametrize("p", [0.7, 0.8, 0.99, 0.995, 0.999, 0.9999])
def test_pixels_of_one_confidence_are_all_kept(p: float) -> None:
    """As the background of a convolutional network outside the body: the value at the rank is that of all of them."""
    background, organ = torch.tensor([p, 1 - p]), torch.tensor([0.2, 0.8])
    image = torch.cat([background.expand(900, 2), organ.expand(100, 2)]).T[None]
    for denoiser in (CBST(portion=0.2), BDL(tau=0.99999)):
        _, weights = decided(denoise(denoiser, [(image, image)]))
        assert weights.all()


@pytest.mark.parametrize(("round", "portion"), [(0, 0.2), (2, 0.3), (20, 0.5)])
def test_cbst(round: int, portion: float) -> None:
    data = batches()
    p = flat(data)
    theta = naive_cbst(p, portion)
    denoiser = CBST()
    labels, weights = decided(denoise(denoiser, data, round))
    np.testing.assert_allclose(denoiser.thresholds.sigmoid(), theta, atol=NEAR)
    ratio = p / theta
    assert_equal_away_from_threshold(weights, (ratio.max(1) >= 1).astype(float), ratio.max(1) - 1)
    first, second = np.sort(ratio, axis=1)[:, :-3:-1].T
    clear = first - second > 2 * NEAR
    np.testing.assert_array_equal(labels[clear], ratio.argmax(1)[clear])


def test_cbst_label_may_differ_from_the_most_probable_class() -> None:
    """Class 1 never has high confidence, so its threshold is low: a probability of 0.45 has the largest ratio."""
    confident = torch.tensor([0.999, 0.001]).view(1, 2, 1).expand(1, 2, 20)
    rare = torch.tensor([0.40, 0.60]).view(1, 2, 1).expand(1, 2, 10)
    ambiguous = torch.tensor([0.55, 0.45]).view(1, 2, 1)
    p = torch.cat([confident, rare, ambiguous], dim=2)
    [(labels, _)] = denoise(CBST(portion=0.5), [(p, p)])
    assert p[0, :, -1].argmax() == 0
    assert labels[0, -1] == 1


@pytest.mark.parametrize(
    "denoiser", [BDL(), CBST(), CRST(), CRST(regulariser="lrent"), IAST()], ids=lambda d: type(d).__name__
)
def test_class_that_never_occurs(denoiser: DatasetDenoiser) -> None:
    logits = torch.randn(2, CLASSES, 10, 10)
    logits[:, 2] -= 100
    p = logits.softmax(1)
    [(labels, weights)] = denoise(denoiser, [(p, p)])
    hard = labels if labels.ndim == 3 else labels.argmax(1)
    assert 2 not in hard[weights > 0]
    assert torch.isfinite(weights).all()
    assert weights.any()


@pytest.mark.parametrize("denoiser", [BDL(), CBST(portion=0.25)], ids=lambda d: type(d).__name__)
def test_saturated_probabilities_are_ranked(denoiser: DatasetDenoiser) -> None:
    """All confidences round to 1 in bfloat16 and most in float32; the statistics still rank them."""
    logits = torch.zeros(1, 2, 400)
    logits[0, 0] = torch.linspace(17.5, 25, 400)
    p = logits.softmax(1)
    assert (p[:, 0].bfloat16() == 1).all()
    assert (p[:, 0] == 1).float().mean() > 0.9
    _, confidence = predicted(p)
    torch.testing.assert_close(confidence[0], logits[0, 0], atol=1e-3, rtol=0)
    if isinstance(denoiser, BDL):
        denoiser.tau = 1 - 1e-16
    [(_, weights)] = denoise(denoiser, [(p, p)])
    assert weights.sum() == pytest.approx(100 if isinstance(denoiser, CBST) else 200, abs=3)


def test_logits_of_all_classes() -> None:
    p = (torch.randn(2, 5, 50) * 3).softmax(1)
    torch.testing.assert_close(
        class_logits(p, *predicted(p)), (p.double() / (1 - p.double())).log().float(), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_crst_soft_labels(alpha: float) -> None:
    """A pixel is kept where its soft label costs less than none: of an unsure network more pixels than with CBST."""
    data = batches(1, sharpness=0.7)
    p, theta = flat(data), naive_cbst(flat(data), 0.2)
    [(labels, weights)] = denoise(CRST(regulariser="lrent", alpha=alpha), data)
    gains = (p / theta) ** (1 / alpha)
    q = gains / gains.sum(1, keepdims=True)
    np.testing.assert_allclose(labels.movedim(1, -1).reshape(-1, CLASSES), q, atol=0.02)
    cost = (q * (alpha * np.log(q) - np.log(p / theta))).sum(1)
    assert_equal_away_from_threshold(weights.flatten().numpy(), (cost <= 0) * 1.0, cost)
    assert ((cost <= 0) & ((p / theta).max(1) < 1)).any()


def test_crst_losses() -> None:
    main, aux, labels = torch.randn(1, 3, 5), torch.randn(1, 3, 5), torch.tensor([[0, 1, 2, 0, 1]])
    weights = torch.tensor([[1.0, 0, 1, 1, 0]])
    expected = 0.0
    for logits in (main, aux):
        log_p = logits.log_softmax(1)[0]
        for n in (0, 2, 3):
            expected += (-log_p[labels[0, n], n] + 0.1 * -log_p[:, n].mean()).item() / 3 / 2
    assert CRST().loss(main, aux, labels, weights).item() == pytest.approx(expected, rel=1e-5)
    weighted = CRST(weight=0.3).loss(main, aux, labels, weights) - CRST(weight=0.0).loss(main, aux, labels, weights)
    both = [-logits.log_softmax(1)[0, :, n].mean().item() for logits in (main, aux) for n in (0, 2, 3)]
    assert weighted.item() == pytest.approx(0.3 * sum(both) / 6, rel=1e-5)
    soft = torch.rand(1, 3, 5).softmax(1)
    expected = 0.0
    for logits in (main, aux):
        for n in (0, 2, 3):
            expected += -(soft[0, :, n] * logits.log_softmax(1)[0, :, n]).sum().item() / 3 / 2
    assert CRST(regulariser="lrent").loss(main, aux, soft, weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("beta", "gamma"), [(0.9, 8.0), (0.5, 2.0)])
def test_iast_over_three_rounds(beta: float, gamma: float) -> None:
    denoiser, theta = IAST(beta=beta, gamma=gamma), np.full(CLASSES, 0.9)
    for round, alpha in enumerate((0.2, 0.25, 0.3)):
        data = batches()
        p = flat(data)
        label, confidence = p.argmax(1), p.max(1)
        for c in range(CLASSES):
            values = np.append(confidence[label == c], theta[c])
            percentile = np.percentile(values, 100 * (1 - alpha * theta[c] ** gamma))
            theta[c] = min(0.999, beta * theta[c] + (1 - beta) * percentile)
        labels, weights = decided(denoise(denoiser, data, round))
        np.testing.assert_array_equal(labels, label)
        np.testing.assert_allclose(denoiser.thresholds, theta, atol=NEAR / 2)
        assert_equal_away_from_threshold(weights, (confidence >= theta[label]) * 1.0, confidence - theta[label])


def test_iast_resumes_with_its_thresholds() -> None:
    data, whole, parted = batches(), IAST(), IAST()
    denoise(whole, data, 0)
    denoise(parted, data, 0)
    resumed = IAST()
    resumed.load_state_dict(parted.state_dict())
    for denoiser in (whole, resumed):
        denoise(denoiser, data, 1)
    assert torch.equal(whole.thresholds, resumed.thresholds)


def test_iast_loss() -> None:
    logits, labels = torch.randn(1, 3, 4), torch.tensor([[0, 1, 2, 0]])
    weights = torch.tensor([[1.0, 0, 1, 0]])
    log_p = logits.log_softmax(1)[0]
    kept = sum(-log_p[labels[0, n], n] + 0.1 * -log_p[:, n].mean() for n in (0, 2)) / 2
    ignored = sum(-(log_p[:, n].exp() * log_p[:, n]).sum() for n in (1, 3)) / 2
    expected = float(kept + 3 * ignored)
    assert IAST().loss(logits, logits, labels, weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("denoiser", [Threshold(), CRST(), IAST(), MRNet()], ids=lambda d: type(d).__name__)
def test_loss_without_kept_pixels_is_finite(denoiser: Any) -> None:
    main, aux = (torch.randn(1, 3, 4, requires_grad=True) for _ in range(2))
    loss = denoiser.loss(main, aux, torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(main.grad).all()


def test_mrnet_loss_and_its_gradient() -> None:
    """The weight exp(-v) is not detached: gradients flow through it."""
    main, aux = (torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.tensor([[0, 1, 2, 0]])

    def one(first: Tensor, second: Tensor) -> Tensor:
        total = first.new_zeros(())
        for n in range(4):
            p, q = first[0, :, n].softmax(0), second[0, :, n].softmax(0)
            v = sum(q[c] * (q[c] / p[c]).log() for c in range(3))
            total = total + (torch.exp(-v) * -p[labels[0, n]].log() + v) / 4
        return total

    expected = one(main, aux) + 0.3 * one(aux, main)
    wanted = torch.autograd.grad(expected, (main, aux))
    loss = MRNet(aux_weight=0.3).loss(main, aux, labels, torch.ones(1, 4))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for gradient, right in zip(torch.autograd.grad(loss, (main, aux)), wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)


class Affine(nn.Module):
    """A network of 1 x 1 convolutions, for which flipped views give the same predictions."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Dropout(dropout))
        self.classifier = nn.Conv2d(6, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(image))
        return logits


def predictor(dropout: float = 0.0) -> Predictor:
    return Predictor(APLModule(Affine(dropout), CLASSES).eval())


@torch.no_grad()
def test_mrnet_fuses_its_views() -> None:
    predict, image = predictor(), torch.rand(2, 1, 10, 10)
    main, aux = predict.logits(image)
    expected = (main + 0.5 * aux).softmax(1)
    fused, same = MRNet(scales=(1.0,), flips=(-1, -2)).predict(
        predict, image
    )  # flips change nothing for 1 x 1 convolutions
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(fused, same)
    calls = []
    module = predict._module
    module.register_forward_hook(lambda *_: calls.append(1))
    MRNet().predict(predict, image)
    assert len(calls) == 4


@torch.no_grad()
def test_upl_inverts_its_rotations() -> None:
    predict, image = predictor(), torch.rand(2, 1, 10, 10)
    p_main, p_aux = predict(image)
    mean, _ = UPL().predict(predict, image)
    torch.testing.assert_close(mean, (p_main + p_aux) / 2)


def test_upl_keeps_the_largest_component_of_each_class() -> None:
    label = torch.tensor([[1, 1, 0, 2, 0, 1], [0, 0, 0, 2, 0, 0], [1, 0, 2, 0, 0, 0]])
    p = nn.functional.one_hot(label, 3).movedim(-1, 0)[None].float() * 0.97 + 0.01
    labels, weights = UPL()(p, p)
    assert torch.equal(labels[0], label)
    expected = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1]]).float()
    assert torch.equal(weights[0], expected)


def test_upl_keeps_pixels_above_its_threshold() -> None:
    p = torch.tensor([0.95, 0.85, 0.05, 0.6]).view(1, 1, 1, 4)
    p = torch.cat([p, 1 - p], dim=1)
    assert UPL()(p, p)[1].flatten().tolist() == [1, 0, 1, 0]
    assert UPL(tau=0.8)(p, p)[1].flatten().tolist() == [1, 1, 1, 0]


@torch.no_grad()
def test_dpl() -> None:
    """Compare weights with loops over pixels: deviation over passes, prototypes and the nearest prototype."""
    predict, images = predictor(0.3), torch.rand(3, 1, 6, 6)
    denoiser = DPL(passes=5, eta=0.04)
    predictions = [denoiser.predict(predict, image[None]) for image in images]
    made = denoise(denoiser, predictions)
    sums, masses = torch.zeros(CLASSES, 6), torch.zeros(CLASSES)
    pixels = list(product(range(6), range(6)))
    for p_main, p_aux, deviation, features in predictions:
        for i, j in pixels:
            p = (p_main + p_aux)[0, :, i, j] / 2
            if deviation[0, i, j] < 0.04:
                sums[p.argmax()] += p.max() * features[0, :, i, j]
                masses[p.argmax()] += p.max()
    assert 0 < masses.count_nonzero() < CLASSES, "at least one class has no prototype"
    prototypes = {c: sums[c] / masses[c] for c in range(CLASSES) if masses[c]}
    for (p_main, p_aux, deviation, features), (labels, weights) in zip(predictions, made, strict=True):
        for i, j in pixels:
            p = (p_main + p_aux)[0, :, i, j] / 2
            nearest = min(prototypes, key=lambda c: float((features[0, :, i, j] - prototypes[c]).norm()))
            assert labels[0, i, j] == p.argmax()
            assert weights[0, i, j] == float(deviation[0, i, j] < 0.04 and nearest == p.argmax())


def test_dpl_asks_the_nearest_prototype() -> None:
    """Of four stable pixels the third looks like the other class, and the unstable one has no say in a prototype."""
    p = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2, 0.6]).view(1, 1, 1, 6)
    p = torch.cat([1 - p, p], dim=1)  # labels 1 1 1 0 0 1
    deviation = torch.tensor([[[0.01, 0.01, 0.01, 0.01, 0.01, 0.2]]])
    features = torch.tensor([5.0, 6.0, 1.0, 0.0, 2.0, -900.0]).view(1, 1, 1, 6) + 500
    denoiser = DPL()
    [(labels, weights)] = denoise(denoiser, [(p, p, deviation, features)])
    assert labels.flatten().tolist() == [1, 1, 1, 0, 0, 1]
    assert weights.flatten().tolist() == [1, 1, 0, 1, 1, 0]
    sure = (0.9 * 5 + 0.8 * 6 + 0.7 * 1) / 2.4, (0.9 * 0 + 0.8 * 2) / 1.7  # weighted by their probability
    assert denoiser.prototypes.flatten().tolist() == pytest.approx([500 + sure[1], 500 + sure[0]])


@torch.no_grad()
def test_dropout_that_never_runs_is_not_taken_for_dropout() -> None:
    """EfficientNets keep that of their classifier of whole images."""
    network = Affine()
    network.unused = nn.Dropout(0.2)
    predict, image = Predictor(APLModule(network, CLASSES).eval()), torch.rand(1, 1, 6, 6)
    assert not torch.equal(predict.with_dropout(image, 0.5).main, predict.with_dropout(image, 0.5).main)
    assert Chebyshev(passes=4).predict(predict, image)[2].max() > 0


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_passes_differ_and_keep_evaluation_mode(dropout: float) -> None:
    predict, image = predictor(dropout), torch.rand(1, 1, 6, 6)
    assert not torch.equal(predict.with_dropout(image, 0.5).main, predict.with_dropout(image, 0.5).main)
    assert torch.equal(predict.logits(image).main, predict.logits(image).main)
    assert not any(module.training for module in predict._module.modules())


def test_chebyshev() -> None:
    denoiser = Chebyshev(passes=6, smallest=0.01, largest=0.05, rounds=3)
    top = torch.tensor([0.9, 0.9, 0.9, 0.6, 0.4, 0.9])
    p = torch.stack([top, (1 - top) / 2, (1 - top) / 2])[None, :, None]  # of three classes, so 0.4 is the largest
    # The bounds for 0.9 and the variances are 0.006, 0.024, 0.048 and 0.2; for 0.6 it is 0.09.
    variance = torch.tensor([0.001, 0.004, 0.008, 0.001, 0.0001, 0.04]).view(1, 1, 6)
    for round, kept in ((0, [1, 0, 0, 0, 0, 0]), (1, [1, 1, 0, 0, 0, 0]), (2, [1, 1, 1, 0, 0, 0])):
        [(labels, weights)] = denoise(denoiser, [(p, p, variance)], round)
        assert not labels.any()
        assert weights.flatten().tolist() == kept
    assert denoise(denoiser, [(p, p, variance)], 9)[0][1].flatten().tolist() == [1, 1, 1, 0, 0, 0]


@torch.no_grad()
def test_variance_over_dropout_passes() -> None:
    """The variance is that of the merged probability of the label, over passes that draw the same numbers."""
    predict, images = predictor(0.3), torch.rand(2, 1, 8, 8)
    torch.manual_seed(0)
    p_main, p_aux, variance = Chebyshev(passes=6).predict(predict, images)
    torch.manual_seed(0)
    passes = [predict.with_dropout(images, 0.5) for _ in range(6)]
    merged = torch.stack([(main.softmax(1) + aux.softmax(1)) / 2 for main, aux in passes])
    torch.testing.assert_close((p_main + p_aux) / 2, merged.mean(0))
    labels = merged.mean(0).argmax(1, keepdim=True)
    torch.testing.assert_close(variance, merged.var(0).gather(1, labels)[:, 0])
    assert variance.min() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(1.0), "tau"),
        (lambda: Threshold(normalise="mean"), "normalise"),  # type: ignore[arg-type]
        (lambda: BDL(0), "tau"),
        (lambda: CBST(portion=0.6), "portion"),
        (lambda: CRST(regulariser="kld"), "regulariser"),  # type: ignore[arg-type]
        (lambda: IAST(alphas=()), "alphas"),
        (lambda: DPL(passes=1), "passes"),
        (lambda: UPL(views=0), "views"),
        (lambda: Chebyshev(smallest=0.1), "smallest"),
        (lambda: MRNet(scales=()), "scales"),
        (lambda: MRNet(scales=1.0), "a list of `scales`"),  # type: ignore[arg-type]
        (lambda: MRNet(flips=-1), "a list of `flips`"),  # type: ignore[arg-type]
        (lambda: MRNet(flips=(1,)), "the first spatial axis is 2"),
        (lambda: MRNet(aux_weight=-1), "aux_weight"),
        (lambda: UPL(plane=(0, 1)), "`plane` to be two spatial axes"),
        (lambda: UPL(plane=3), "`plane` to be two spatial axes"),  # type: ignore[arg-type]
        (lambda: IAST(alphas=0.2), "a list of `alphas`"),  # type: ignore[arg-type]
        (lambda: IAST(kept_weight=-3), "weights >= 0"),
    ],
)
def test_bad_options_are_an_error(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_iast_starts_anew() -> None:
    p = (torch.randn(2, 3, 20, 20) * 3).softmax(1)
    used = IAST()
    for round in (0, 1):
        denoise(used, [(p, p)], round)
    denoise(used, [(p, p)], 0)
    fresh = IAST()
    denoise(fresh, [(p, p)], 0)
    assert torch.equal(used.thresholds, fresh.thresholds)


def test_ignored_pixels_of_mrnet() -> None:
    main, aux = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    labels, weights = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    kept = MRNet().loss(main[..., ::2], aux[..., ::2], labels[:, ::2], torch.ones(1, 2))
    torch.testing.assert_close(MRNet().loss(main, aux, labels, weights), kept)


def test_probabilities_of_exactly_1() -> None:
    """Softmax gives 1 and 0 from a difference of 104 logits on."""
    p = torch.tensor([1.0, 1.0, 0.6, 0.6])
    p = torch.stack([p, 1 - p])[None]
    assert predicted(p)[1].isfinite().all()
    assert denoise(CBST(portion=0.5), [(p, p)])[0][1].tolist() == [[1, 1, 0, 0]]
    assert denoise(BDL(), [(p[..., :2], p[..., :2])])[0][1].tolist() == [[1, 1]]


def test_largest_threshold_of_iast() -> None:
    p = torch.tensor([[[0.99999] * 50], [[0.00001] * 50]]).view(1, 2, 50)
    denoiser = IAST(beta=0.0)
    denoise(denoiser, [(p, p)])
    assert denoiser.thresholds[0].item() == pytest.approx(0.999)


def test_half_kept_pixels_are_not_ignored() -> None:
    logits, labels = torch.randn(1, 3, 2), torch.tensor([[0, 1]])
    ones, halves = (IAST().loss(logits, logits, labels, torch.full((1, 2), w)) for w in (1.0, 0.5))
    torch.testing.assert_close(ones, halves)


def test_first_option_of_crst() -> None:
    with pytest.raises(TypeError, match="pass regulariser='lrent'"):
        CRST("lrent")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("denoiser", [CBST(), CRST(regulariser="lrent"), IAST()], ids=lambda d: type(d).__name__)
def test_probabilities_of_any_precision(denoiser: DatasetDenoiser, dtype: torch.dtype) -> None:
    p = (torch.randn(1, 3, 20) * 3).softmax(1)
    [(labels, weights)] = denoise(denoiser, [(p.to(dtype), p.to(dtype))])
    assert labels.shape[-1] == weights.shape[-1] == 20
    assert weights.any()


def test_views_of_mrnet_never_grow() -> None:
    """A scale of 0.8 keeps an axis that is shorter than the multiple of 32 it would get."""
    sizes = []
    module = APLModule(nn.Sequential(nn.Conv3d(1, 4, 1), nn.Conv3d(4, CLASSES, 1)), CLASSES).eval()
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    MRNet(flips=()).predict(Predictor(module), torch.rand(1, 1, 12, 64, 120))
    assert sizes == [(12, 64, 120), (12, 64, 96)]

"""Networks with two heads: unchanged logits, export with the original keys, routed gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import routing
from conftest import CLASSES, TinyNet
from torch import Tensor, nn

from apl_lightning import HeadNotFoundError, add_dual_heads
from apl_lightning.heads import warm_up_second_head
from apl_lightning.heads.new_head import perturbed


def test_copies_are_independent(network: TinyNet) -> None:
    model, image = add_dual_heads(network, CLASSES).eval(), torch.rand(2, 1, 16, 16)
    expected = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image).aux, expected.aux)
        assert twin.second is not None
        nn.init.zeros_(twin.second.weight)
        assert not torch.equal(twin(image).aux, expected.aux), "the hooks of the copy use the second head of the copy"
    assert torch.equal(model(image).aux, expected.aux)


def test_half_precision_and_compile(network: TinyNet) -> None:
    model, image = add_dual_heads(network, CLASSES).eval(), torch.rand(2, 1, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(image).main.dtype == torch.bfloat16
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(image).aux, model(image).aux)


def test_statistics_of_the_head_are_updated_once() -> None:
    class HeadWithNorm(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, CLASSES, 1))

    model = add_dual_heads(HeadWithNorm(), CLASSES, head="classifier").train()
    before = model.network.get_submodule("classifier.1").num_batches_tracked.item()
    model.routed(torch.rand(2, 1, 16, 16))
    assert model.network.get_submodule("classifier.1").num_batches_tracked.item() == before + 1


def test_second_output_of_the_network() -> None:
    class TwoOutputs(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.early = nn.Conv2d(8, CLASSES, 1)

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            middle = self.encoder[:3](image)
            return self.early(middle), self.classifier(self.encoder[3](middle))

    network, image = TwoOutputs().eval(), torch.rand(2, 1, 16, 16)
    model = add_dual_heads(network, CLASSES, main_output=1)
    aux, main = network(image)
    assert torch.equal(model(image).main, main)
    assert torch.equal(model(image).aux, aux)
    assert model.second is None
    routing(model, image)
    assert list(model.export().state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("aux", ["fresh", "encoder.2"])
def test_new_second_head_is_warmed_up_on_the_first(network: TinyNet, aux: str) -> None:
    model, images = add_dual_heads(network, CLASSES, aux=aux).eval(), torch.rand(4, 1, 16, 16)
    before = copy.deepcopy(model.state_dict())

    def distance() -> float:
        main, second = model(images)
        return (main.softmax(1) - second.softmax(1)).abs().mean().item()

    cold = distance()
    assert not model.warm
    warm_up_second_head(model, [images], steps=100)
    assert model.warm
    assert distance() < cold / 2
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"second.weight", "second.bias", "warm"}
    routing(model, images)


def test_warm_up_keeps_no_graph_of_the_encoder(network: TinyNet) -> None:
    network.encoder[0].bias.requires_grad_(False)
    model = add_dual_heads(network, CLASSES, aux="fresh").eval()
    before, features = [p.requires_grad for p in model.parameters()], []
    model.network.encoder.register_forward_hook(lambda module, inputs, output: features.append(output))
    warm_up_second_head(model, [torch.rand(2, 1, 8, 8)], steps=1)
    assert not any(feature.requires_grad for feature in features)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


def test_export_of_averaged_linear_heads(network: TinyNet) -> None:
    model, image = add_dual_heads(network, CLASSES).eval(), torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(model.export(average=True)(image), torch.stack(list(model(image))).mean(0))
    with pytest.raises(ValueError, match="two heads of one linear layer of torch each"):
        add_dual_heads(network, CLASSES, aux="encoder.2").export(average=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, None])
def test_heads_whose_weights_are_computed(norm: Any) -> None:
    """New parameters do not mean new weights, and the mean of parameters is not that of logits."""
    network = TinyNet()
    network.classifier = Cosine() if norm is None else norm(network.classifier)
    with pytest.raises(ValueError, match="aux='fresh' to draw new weights .* computes the same: .* aux='perturbed'"):
        add_dual_heads(network, CLASSES, aux="fresh")
    with pytest.raises(ValueError, match="two heads of one linear layer of torch each"):
        add_dual_heads(network, CLASSES).export(average=True)


class Cosine(nn.Module):
    """Logits of directions, as in a cosine classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 6, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return 10 * nn.functional.conv2d(nn.functional.normalize(features), nn.functional.normalize(self.weight))


def test_mode_is_kept(network: TinyNet) -> None:
    network.encoder[1].eval()
    model = add_dual_heads(network, CLASSES)
    assert model.training
    assert not model.network.encoder[1].training
    assert not add_dual_heads(network.eval(), CLASSES).training


class WithActivation(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.network, self.activation = TinyNet(), activation

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.activation(self.network(image))
        return result


class AddsItsInput(WithActivation):
    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + image


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (
            TinyNet,
            {"num_classes": 7},
            ValueError,
            r"\(B, 7, ...\) logits, but got \(2, 3, 64, 64\) .*pass num_classes=3",
        ),
        (TinyNet, {"num_classes": 1}, ValueError, "integer of at least 2, but got 1"),
        (
            TinyNet,
            {"head": "decoder"},
            ValueError,
            "`head` to be the dotted path of a module of TinyNet, but got 'decoder'",
        ),
        (TinyNet, {"aux": "layer9"}, ValueError, "`aux` to be 'auto', .* or the dotted path .* but got 'layer9'"),
        (TinyNet, {"aux": "own"}, ValueError, "two outputs with 3 channels and a classifier each for aux='own'"),
        (TinyNet, {"main_output": 1}, ValueError, "`main_output` at least 0 and below 1"),
        (lambda: WithActivation(nn.Softmax(dim=1)), {}, ValueError, r"behind a sigmoid or a softmax.*activation=None"),
        (AddsItsInput, {}, HeadNotFoundError, "treat each image by itself behind its classifier 'network.classifier'"),
        (lambda: WithActivation(nn.Sigmoid()), {}, ValueError, r"behind a sigmoid or a softmax.*activation=None"),
        (lambda: torch.compile(TinyNet()), {}, TypeError, "compile what comes out"),
        (lambda: nn.Linear(3, 3), {}, ValueError, "has none: pass `example`"),
        (lambda: nn.Conv2d(1, CLASSES, 3, padding=1), {"head": ""}, ValueError, "weights before its classifier"),
        (TinyNet, {"example": torch.rand(1, 16, 16)}, ValueError, r"got \(1, 16, 16\): pass image\[None\]"),
    ],
)
def test_bad_input_is_an_error(
    build: Callable[[], nn.Module], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        add_dual_heads(build(), **{"num_classes": CLASSES, **options})


def test_noise_of_the_perturbed_head() -> None:
    head = nn.Conv2d(64, 32, 3)
    for old, new in zip(head.parameters(), perturbed(head).parameters(), strict=True):
        assert float((new - old).detach().norm() / old.detach().norm()) == pytest.approx(0.1, rel=0.5)

"""Two heads on any network: the same logits, the same keys back, gradients where they belong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import monai.networks.nets as monai_nets
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import CLASSES, TinyNet
from torch import Tensor, nn

from apl_lightning import DualHeadModel, HeadNotFoundError, add_dual_heads
from apl_lightning.probe import example_input
from apl_lightning.warmup import warm_up_second_head


def smp_network(name: str) -> nn.Module:
    return getattr(smp, name)("resnet18", encoder_weights=None, in_channels=3, classes=5)


def monai_network(name: str, dimensions: int) -> nn.Module:
    if name == "UNet":
        return monai_nets.UNet(dimensions, 1, 5, (8, 16, 32), (2, 2), num_res_units=2, norm="batch")
    if name == "UNet without residual units":
        return monai_nets.UNet(dimensions, 1, 5, (8, 16, 32), (2, 2), norm="batch")
    if name == "BasicUNet":
        return monai_nets.BasicUNet(dimensions, 1, 5, (8, 8, 16, 16, 32, 8))
    if name == "SegResNet":
        return monai_nets.SegResNet(dimensions, 8, 1, 5)
    return monai_nets.DynUNet(dimensions, 1, 5, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16])


MONAI = ["UNet", "UNet without residual units", "BasicUNet", "SegResNet", "DynUNet"]
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    **{
        f"smp {name}": ("segmentation_head.0", lambda name=name: smp_network(name))
        for name in ("Unet", "DeepLabV3Plus", "FPN", "Segformer")
    },
    **{
        f"monai {name} {dimensions}D": (head, lambda name=name, dimensions=dimensions: monai_network(name, dimensions))
        for name, head in zip(
            MONAI, ["model.2", "model.2.conv", "final_conv", "conv_final.2.conv", "output_block.conv.conv"], strict=True
        )
        for dimensions in (2, 3)
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_known_architectures(name: str) -> None:
    head, build = NETWORKS[name]
    network = build().eval()
    image = example_input(network)
    with torch.no_grad():
        expected = network(image)
    model = add_dual_heads(network, 5)
    assert model.head == head

    main, aux = model(image)
    assert torch.equal(main, expected)
    assert not torch.allclose(aux, expected, atol=1e-3)

    plain = model.export()
    assert type(plain) is type(network)
    assert list(plain.state_dict()) == list(network.state_dict())
    assert torch.equal(plain(image), expected)
    assert torch.equal(network(image), expected), "the network that came in is as it was"

    routing(model, image)


def routing(model: DualHeadModel, image: Tensor) -> None:
    """Each pair of logits has a gradient on its own side only, the one that a separate network would have."""
    for_heads, for_encoder = model.routed(image)
    for logits in (for_heads, for_encoder):
        torch.testing.assert_close(logits.main, model(image).main, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits.aux, model(image).aux, rtol=1e-4, atol=1e-5)
    heads, encoder = model.head_parameters(), model.encoder_parameters()
    sum(z.square().mean() for z in model(image)).backward()
    expected = {id(p): p.grad for p in heads + encoder if p.grad is not None}
    for logits, mine, others in ((for_heads, heads, encoder), (for_encoder, encoder, heads)):
        model.zero_grad()
        sum(z.square().mean() for z in logits).backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in others)
        for parameter in mine:
            if id(parameter) in expected:
                torch.testing.assert_close(parameter.grad, expected[id(parameter)], rtol=1e-3, atol=1e-6)


def test_copies_are_independent(network: TinyNet) -> None:
    model, image = add_dual_heads(network, CLASSES).eval(), torch.rand(2, 1, 16, 16)
    expected = model(image)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image).aux, expected.aux)
        assert twin.second is not None
        nn.init.zeros_(twin.second.weight)
        assert not torch.equal(twin(image).aux, expected.aux), "the copy's hooks read the copy's second head"
    assert torch.equal(model(image).aux, expected.aux)


def test_half_precision_and_compile(network: TinyNet) -> None:
    model, image = add_dual_heads(network, CLASSES).eval(), torch.rand(2, 1, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(image).main.dtype == torch.bfloat16
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(image).aux, model(image).aux)


def test_frozen_head_moves_no_statistics() -> None:
    class HeadWithNorm(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, CLASSES, 1))

    model = add_dual_heads(HeadWithNorm(), CLASSES, head="classifier").train()
    before = model.network.get_submodule("classifier.1").num_batches_tracked.item()
    model.routed(torch.rand(2, 1, 16, 16))
    assert model.network.get_submodule("classifier.1").num_batches_tracked.item() == before + 1


def test_own_second_output() -> None:
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
def test_cold_heads_warm_up_on_the_first(network: TinyNet, aux: str) -> None:
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


def test_average_of_linear_heads(network: TinyNet) -> None:
    model, image = add_dual_heads(network, CLASSES).eval(), torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(model.export(average=True)(image), torch.stack(list(model(image))).mean(0))
    with pytest.raises(ValueError, match="two heads of one linear layer each for average=True"):
        add_dual_heads(network, CLASSES, aux="encoder.2").export(average=True)


def test_mode_is_kept(network: TinyNet) -> None:
    network.encoder[1].eval()
    model = add_dual_heads(network, CLASSES)
    assert model.training
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
        (TinyNet, {"aux": "own"}, ValueError, "two outputs with 3 channels for aux='own'"),
        (TinyNet, {"main_output": 1}, ValueError, "`main_output` below 1"),
        (lambda: WithActivation(nn.Softmax(dim=1)), {}, ValueError, r"behind a sigmoid or a softmax.*activation=None"),
        (AddsItsInput, {}, HeadNotFoundError, "treat each image by itself behind its classifier 'network.classifier'"),
        (lambda: WithActivation(nn.Sigmoid()), {}, ValueError, r"behind a sigmoid or a softmax.*activation=None"),
        (lambda: torch.compile(TinyNet()), {}, TypeError, "compile what comes out"),
        (lambda: nn.Linear(3, 3), {}, ValueError, "has none: pass `example`"),
    ],
)
def test_bad_input_is_explained(
    build: Callable[[], nn.Module], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        add_dual_heads(build(), **{"num_classes": CLASSES, **options})

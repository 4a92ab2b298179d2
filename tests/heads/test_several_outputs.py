"""Networks with several outputs: probabilities beside logits, deep supervision, a refined second map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import routing
from conftest import CLASSES, TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning import APLModule, HeadNotFoundError, SelfTrainingModule, TentModule, add_dual_heads


class Outputs(TinyNet):
    """Returns what `outputs` makes of the logits."""

    def __init__(self, outputs: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, image: Tensor) -> Any:
        return self.outputs(super().forward(image))


def one_hot(z: Tensor) -> Tensor:
    return (z == z.amax(1, keepdim=True)).float()


@pytest.mark.parametrize(
    "outputs",
    [
        lambda z: (z, z.softmax(1)),
        lambda z: (z.softmax(1), z),
        lambda z: {"logits": z, "probs": z.sigmoid()},
        lambda z: {"mask": one_hot(z), "logits": z, "labels": z.argmax(1), "positive": z > 0},
        lambda z: [z, z.log_softmax(1), z.softmax(1)],
        lambda z: (z, F.avg_pool2d(z, 2)),
    ],
)
def test_functions_of_the_logits_are_no_second_head(outputs: Callable[[Tensor], Any]) -> None:
    network, image = Outputs(outputs).eval(), torch.rand(2, 1, 16, 16)
    model = add_dual_heads(network, CLASSES)
    assert torch.equal(model(image).main, TinyNet.forward(network, image))
    assert model.second is not None
    routing(model, image)
    with pytest.raises(ValueError, match=r"two outputs with 3 channels and a classifier each .* aux='perturbed' or"):
        add_dual_heads(network, CLASSES, aux="own")


def test_selected_probabilities_are_an_error() -> None:
    with pytest.raises(ValueError, match="behind a sigmoid or a softmax"):
        add_dual_heads(Outputs(lambda z: (z, z.softmax(1))), CLASSES, main_output=1)


class Calibrated(TinyNet):
    """Logits, and probabilities with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(image)
        return logits, (logits / self.temperature).softmax(1)


def test_probabilities_with_own_parameters_name_the_cure() -> None:
    network, image = Calibrated().eval(), torch.rand(2, 1, 16, 16)
    with pytest.raises(HeadNotFoundError, match=r"found none: pass `head`, .* or `main_output`, if another output"):
        add_dual_heads(network, CLASSES)
    model = add_dual_heads(network, CLASSES, main_output=0)
    assert torch.equal(model(image).main, network(image)[0])


class Stages(TinyNet):
    """Returns the logits of three stages, as nnU-Net does with deep supervision."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.lower = nn.ModuleList(nn.Conv2d(8, CLASSES, 1) for _ in range(stages - 1))

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.encoder[:3](image)
        main = self.classifier(self.encoder[3](features))
        return [main, *(head(F.avg_pool2d(features, 2**n)) for n, head in enumerate(self.lower, 1))]


@pytest.mark.parametrize("stages", [2, 3])
def test_lower_stages_are_no_second_head(stages: int) -> None:
    network, image = Stages(stages).eval(), torch.rand(2, 1, 16, 16)
    model = add_dual_heads(network, CLASSES)
    assert model.head == "classifier"
    assert model.second is not None
    assert torch.equal(model(image).main, network(image)[0])
    assert not model.network.get_submodule("lower.0").weight.requires_grad, "no loss reaches it"
    routing(model, image)
    message = r"one shape .* but got \(2, 3, 64, 64\) and \(2, 3, 32, 32\)" if stages == 2 else "a classifier each"
    with pytest.raises(ValueError, match=f"{message}.*: use aux='perturbed'"):
        add_dual_heads(network, CLASSES, aux="own")


class Refined(TinyNet):
    """Coarse logits and their refinement, which reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = nn.Conv2d(CLASSES, CLASSES, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        coarse = super().forward(image)
        return coarse, self.refine(coarse)


def test_second_output_in_front_of_the_first_is_no_second_head() -> None:
    network, image = Refined().eval(), torch.rand(2, 1, 16, 16)
    model = add_dual_heads(network, CLASSES)
    assert (model.head, model.second is None) == ("refine", False)
    assert torch.equal(model(image).main, network(image)[1])
    routing(model, image)
    with pytest.raises(HeadNotFoundError, match="joined along the batch"):
        add_dual_heads(network, CLASSES, aux="own")


def test_second_head_behind_the_first_is_an_error() -> None:
    with pytest.raises(HeadNotFoundError, match="as `aux` a layer before it"):
        add_dual_heads(Refined(), CLASSES, aux="refine", main_output=0)


@pytest.mark.parametrize("kind", [APLModule, SelfTrainingModule, TentModule])
def test_modules_take_the_main_output(kind: Any) -> None:
    network, image = Refined().eval(), torch.rand(2, 1, 16, 16)
    for output in (0, 1):
        module = kind(network, CLASSES, main_output=output, batch_norm="train").eval()
        assert torch.equal(module(image).main, network(image)[output])
        assert module.hparams["main_output"] == output

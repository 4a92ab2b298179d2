"""Networks that keep tensors, draw noise, hide gradients or have other weights than float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from architectures import routing
from conftest import CLASSES, Images, TinyNet
from monai.networks.nets import DynUNet
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning import APLModule, add_dual_heads
from apl_lightning.heads import warm_up_second_head


def dyn_unet() -> DynUNet:
    """MONAI's network keeps the outputs of its lower heads from each training step."""
    sizes = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3}
    return DynUNet(2, 1, CLASSES, **sizes, filters=[4, 8, 12, 16], deep_supervision=True, deep_supr_num=2)


class Around(nn.Module):
    """A network in another one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


class Project(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = dyn_unet()

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


@pytest.mark.parametrize(
    ("build", "name"), [(dyn_unet, None), (Project, None), (Project, "net"), (lambda: Around(dyn_unet()), None)]
)
def test_network_after_a_training_step(build: Callable[[], nn.Module], name: str | None) -> None:
    network, image = build().train(), torch.rand(2, 1, 32, 32)
    network(image).square().mean().backward()
    model = add_dual_heads(network, CLASSES, network=name)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(image).main, network.eval()(image))
    routing(model, image)
    for_heads, _ = model.train().routed(image)
    assert for_heads.main.shape == (2, CLASSES, 32, 32), "the network returns in training what it returns in evaluation"
    assert model.export().training
    assert all(module.training for module in model.export().modules())


def test_weight_norm_after_a_training_step() -> None:
    network, image = TinyNet(), torch.rand(2, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has a new weight_norm, which keeps nothing
        network.classifier = nn.utils.weight_norm(network.classifier)
    network(image).sum().backward()
    model = add_dual_heads(network.eval(), CLASSES)
    assert torch.equal(model(image).main, network(image))
    routing(model, image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_refused(dtype: torch.dtype) -> None:
    network = TinyNet().to(dtype)
    for build in (add_dual_heads, APLModule):
        with pytest.raises(ValueError, match=f"but got {dtype}, .* call `model.float.*`; .* precision='bf16-mixed'"):
            build(network, CLASSES)
    assert add_dual_heads(network.float(), CLASSES).head == "classifier"


@pytest.mark.parametrize("aux", ["perturbed", "encoder.2"])
def test_double_weights(aux: str) -> None:
    network, image = TinyNet().double().eval(), torch.rand(2, 1, 16, 16, dtype=torch.float64)
    model = add_dual_heads(network, CLASSES, aux=aux)
    assert torch.equal(model(image).main, network(image))
    assert model(image).aux.dtype == torch.float64
    routing(model, image)
    if not model.warm:
        warm_up_second_head(model, [image], steps=2)
    assert all(
        value.dtype == torch.float64 for value in model.export().state_dict().values() if value.is_floating_point()
    )


class Noisy(TinyNet):
    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(F.dropout(self.encoder(image), 0.5, training=True))


class Detached(TinyNet):
    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder(image)
        return self.classifier(features)


class WithoutGradients(TinyNet):
    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)


class Squeezed(TinyNet):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, 0]


def broken() -> TinyNet:
    network = TinyNet()
    with torch.no_grad():
        network.encoder[3].bias[0] = torch.nan
    return network


def negative_variance() -> TinyNet:
    network = TinyNet()
    network.encoder[1].running_var.fill_(-1)
    return network


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (broken, ValueError, "finite logits, but .* 'encoder.3.bias' has NaN or infinity: load other weights"),
        (negative_variance, ValueError, "finite logits, but TinyNet returns NaN or infinity for the example: pass"),
        (Noisy, ValueError, "two passes differ: switch off its noise"),
        (Detached, ValueError, r"no gradient reaches one that `requires_grad`: remove `torch.no_grad\(\)`"),
        (WithoutGradients, ValueError, r"no gradient reaches one that `requires_grad`: remove `torch.no_grad\(\)`"),
        (Squeezed, ValueError, "return logits with a channel dimension"),
    ],
)
def test_network_without_a_head_to_refine(build: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_dual_heads(build(), CLASSES)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "build", [lambda: torch.jit.script(TinyNet()), lambda: torch.jit.trace(TinyNet().eval(), torch.rand(1, 1, 8, 8))]
)
def test_torchscript_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match="got TorchScript, .*: pass the network that it was made from"):
        add_dual_heads(build(), CLASSES)


class ByKeyword(TinyNet):
    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(input=self.encoder(image))


class WithIndices(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.indices = nn.Parameter(torch.arange(3), requires_grad=False)

    def get_extra_state(self) -> dict[str, Any]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state == {"version": 1}


class SameNames(TinyNet):
    """Has parts with the names that the network with two heads uses."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.second, self.warm = (nn.Conv2d(1, 1, 1) for _ in range(3))


@pytest.mark.parametrize("build", [ByKeyword, WithIndices, SameNames])
def test_odd_network_is_served(build: Callable[[], nn.Module]) -> None:
    network, image = build().eval(), torch.rand(2, 1, 16, 16)
    module = APLModule(network, CLASSES)
    model = module.model.eval()
    assert torch.equal(model(image).main, network(image))
    routing(model, image)
    exported = module.export()
    assert type(exported) is build
    network.load_state_dict(exported.state_dict())


def test_number_of_classes_from_numpy(tmp_path: Path, trainer: Any) -> None:
    module = APLModule(TinyNet(), np.int64(CLASSES))
    saving = trainer()
    saving.predict(module, torch.utils.data.DataLoader(Images(2), 2))
    saving.save_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    loaded = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert loaded["hyper_parameters"]["num_classes"] == CLASSES

"""A binary network with one logit z is served as two classes with the logits (0, z)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
from architectures import routing
from conftest import Images, TinyNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule, TentModule, add_dual_heads
from apl_lightning.heads import warm_up_second_head
from apl_lightning.heads.unwrap import plain_network


class OneLogit(TinyNet):
    """TinyNet with one logit, and other outputs beside it."""

    def __init__(self, *others: str) -> None:
        super().__init__(classes=1)
        self.others = others
        self.early = nn.Conv2d(8, 1, 1)
        self.classes = nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor) -> Any:
        middle = self.encoder[:3](image)
        logit = self.classifier(self.encoder[3](middle))
        maps = {"probability": logit.sigmoid(), "other": self.early(middle), "classes": self.classes(middle)}
        return {"logit": logit, **{name: maps[name] for name in self.others}} if self.others else logit


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


@pytest.mark.parametrize("aux", ["auto", "perturbed", "fresh", "encoder.2"])
def test_foreground_probability_is_the_sigmoid(aux: str) -> None:
    network, image = TinyNet(1).eval(), torch.rand(2, 1, 16, 16)
    model = add_dual_heads(network, 2, aux=aux)
    main, second = model(image)
    torch.testing.assert_close(main.softmax(1)[:, 1:], sigmoid(network(image)))
    torch.testing.assert_close(main.softmax(1).sum(1), torch.ones(2, 16, 16))
    assert second.shape == main.shape == (2, 2, 16, 16)
    assert not torch.allclose(second, main, atol=1e-3)
    routing(model, image)
    if not model.warm:
        warm_up_second_head(model, [image], steps=200)
        torch.testing.assert_close(model(image).aux.softmax(1), main.softmax(1), rtol=0, atol=0.1)


def test_binary_network_is_exported_with_one_logit() -> None:
    network, image = TinyNet(1).eval(), torch.rand(2, 1, 16, 16)
    model = add_dual_heads(network, 2)
    exported = model.export()
    assert list(exported.state_dict()) == list(network.state_dict())
    assert torch.equal(exported(image), network(image))
    mean = torch.stack([logits[:, 1] - logits[:, 0] for logits in model(image)]).mean(0)
    torch.testing.assert_close(model.export(average=True)(image)[:, 0], mean)


def test_unet_of_smp_is_refined(tmp_path: Path, trainer: Callable[..., pl.Trainer]) -> None:
    network = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=1, decoder_channels=(8,) * 5)
    network.eval()
    images = list(Images(4, size=(32, 32)))
    with torch.no_grad():
        labels = [(sigmoid(network(image[None])) > 0.5).long()[0, 0] for image in images]
    module = APLModule(network, 2, ["background", "liver"], batch_norm="frozen", return_probabilities=True)
    evaluation = DataLoader(list(zip(images, labels, strict=True)), 4)
    (found,) = trainer().validate(module, evaluation, verbose=False)
    assert found["val/dice/liver"] == 1

    data = TargetDataModule(images, batch_size=2, store_dir=tmp_path)
    fit = trainer(callbacks=[PseudoLabelCallback()])
    fit.fit(module, data)
    assert {"train/consistency", "train/refinement", "pseudo/class_ratio/liver"} <= set(fit.callback_metrics)

    (prediction,) = trainer().predict(module, DataLoader(images, 4))
    exported = module.export()
    assert type(exported) is smp.Unet
    assert list(exported.state_dict()) == list(network.state_dict())
    batch = torch.stack(images)
    with torch.no_grad():
        torch.testing.assert_close(prediction.probabilities[:, 1:], sigmoid(exported(batch)))
        assert not torch.equal(exported(batch), network(batch)), "the network was trained"


def test_entropy_of_two_classes_is_minimised() -> None:
    network, image = TinyNet(1), torch.rand(2, 1, 16, 16)
    module = TentModule(network, 2)
    p = sigmoid(network.train()(image))
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    torch.testing.assert_close(module.losses(image)["loss"], expected)


def test_probability_beside_the_logit_is_left_out() -> None:
    network, image = OneLogit("probability").eval(), torch.rand(2, 1, 16, 16)
    main, aux = add_dual_heads(network, 2)(image)
    torch.testing.assert_close(main.softmax(1)[:, 1:], network(image)["probability"])
    assert not torch.equal(main, aux)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("other",), r"one logit for the foreground .* which may be those of several labels: pass `main_output`"),
        (("classes",), r"\(B, 2, ...\) logits, .*: pass `main_output`, the index of the foreground's logits"),
    ],
)
def test_one_logit_among_other_maps_must_be_selected(others: tuple[str, ...], message: str) -> None:
    network, image = OneLogit(*others).eval(), torch.rand(2, 1, 16, 16)
    with pytest.raises(ValueError, match=message):
        add_dual_heads(network, 2)
    model = add_dual_heads(network, 2, main_output=0)
    assert model.second is not None, "another map may be another label, so it is no second head by itself"
    assert torch.equal(model(image).main[:, 1:], network(image)["logit"])


def test_own_second_logit() -> None:
    network, image = OneLogit("other", "probability").eval(), torch.rand(2, 1, 16, 16)
    model = add_dual_heads(network, 2, aux="own", main_output=0)
    main, aux = model(image)
    assert model.second is None
    assert torch.equal(main[:, 1:], network(image)["logit"])
    assert torch.equal(aux[:, 1:], network(image)["other"])
    routing(model, image)


@pytest.mark.parametrize(
    ("classes", "num_classes", "cured"),
    [(1, 1, 2), (1, 5, 2), (2, 1, 2), (3, 2, 3)],  # three sigmoids are not binary
)
def test_wrong_number_of_classes_names_a_number_that_works(classes: int, num_classes: int, cured: int) -> None:
    for build in (add_dual_heads, APLModule):
        with pytest.raises(ValueError, match=f"pass num_classes={cured}"):
            build(TinyNet(classes), num_classes)
    with pytest.raises(ValueError, match=f"pass num_classes={cured}"):
        APLModule(TinyNet(classes), num_classes, ["foreground"])
    assert add_dual_heads(TinyNet(classes), cured).channels == classes


def test_sigmoid_in_the_network_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"behind a sigmoid or a softmax.*activation=None"):
        add_dual_heads(nn.Sequential(TinyNet(1), nn.Sigmoid()), 2)


class Adversarial(pl.LightningModule):
    """A segmenter and a discriminator of patches, which also returns one channel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.segmenter = TinyNet(classes)
        self.discriminator = TinyNet(1)


class Binary(Adversarial):
    def forward(self, image: Tensor) -> Tensor:
        return self.segmenter(image).sigmoid()


def test_binary_network_in_a_lightning_module_is_found() -> None:
    project = Binary(1)
    assert plain_network(project, 2) is project.segmenter
    assert type(APLModule(project, 2).export()) is TinyNet


def test_discriminator_is_not_taken_for_a_binary_network() -> None:
    project = Adversarial(2)
    assert plain_network(project, 2) is project.segmenter

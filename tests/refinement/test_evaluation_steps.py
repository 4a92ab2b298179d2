"""`trainer.test` and `trainer.predict` for all modules, batch forms, and loaders with or without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from apl_lightning import APLModule, CaseDice, RefinementModule, SelfTrainingModule, TargetDataModule, TentModule
from apl_lightning.refinement import Prediction

Make = Callable[..., pl.Trainer]
NAMES = ["background", "liver", "spleen"]
FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda image, label: image,
    "image and label": lambda image, label: (image, label),
    "image alone in a tuple": lambda image, label: (image,),
    "dictionary": lambda image, label: {"image": image, "label": label[None], "case": "patient"},
    "unlabelled dictionary": lambda image, label: {"image": image},
}


def samples(form: str) -> list[Any]:
    return [FORMS[form](image, label) for image, label in Images(5, labelled=True)]


def expected_labels(module: Any) -> Tensor:
    images = torch.stack([image for image, _ in Images(5, labelled=True)])
    with torch.no_grad():
        labels: Tensor = module.eval()(images).main.argmax(1)
    return labels


@pytest.mark.parametrize("kind", [APLModule, SelfTrainingModule, TentModule])
@pytest.mark.parametrize("form", FORMS)
def test_predict_returns_label_maps(trainer: Make, kind: Any, form: str) -> None:
    module = kind(TinyNet(), CLASSES)
    found: Any = trainer().predict(module, DataLoader(samples(form), 2, collate_fn=default_collate))
    assert torch.equal(torch.cat(found), expected_labels(module))


@pytest.mark.parametrize("form", FORMS)
def test_predict_with_the_data_module(trainer: Make, form: str) -> None:
    module = APLModule(TinyNet(), CLASSES)
    found: Any = trainer().predict(module, TargetDataModule(predict=samples(form), batch_size=2))
    assert torch.equal(torch.cat(found), expected_labels(module))


def test_probabilities_on_request(trainer: Make) -> None:
    module = APLModule(TinyNet(), CLASSES, return_probabilities=True)
    found: Any = trainer().predict(module, DataLoader(samples("tensor"), 5))
    assert isinstance(found[0], Prediction)
    assert torch.equal(found[0].labels, expected_labels(module))
    torch.testing.assert_close(found[0].probabilities.sum(1), torch.ones(5, 16, 16))
    assert torch.equal(found[0].probabilities.argmax(1), found[0].labels)


def test_predict_uses_the_inferer(trainer: Make) -> None:
    calls: list[tuple[int, ...]] = []

    def tiles(image: Tensor, network: Any) -> Any:
        calls.append(tuple(image.shape))
        halves = [network(half) for half in image.chunk(2, dim=-1)]
        return tuple(torch.cat(pair, dim=-1) for pair in zip(*halves, strict=True))

    pointwise = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1))
    module = APLModule(pointwise, CLASSES, inferer=tiles)
    found: Any = trainer().predict(module, DataLoader(samples("tensor"), 5))
    assert calls == [(5, 1, 16, 16)]
    assert torch.equal(found[0], expected_labels(module))


@pytest.mark.parametrize("kind", [APLModule, SelfTrainingModule, TentModule])
@pytest.mark.parametrize("data_module", [True, False])
def test_test_logs_the_dice(trainer: Make, kind: Any, data_module: bool) -> None:
    module = kind(TinyNet(), CLASSES, NAMES)
    labelled = Images(5, labelled=True)
    dice = CaseDice(CLASSES)
    dice.update(expected_labels(module), torch.stack([label for _, label in labelled]))
    _, liver, spleen = dice.compute().tolist()
    data = TargetDataModule(test=labelled, batch_size=2) if data_module else DataLoader(labelled, 2)
    (found,) = trainer().test(module, data, verbose=False)
    assert found == pytest.approx(
        {"test/dice": (liver + spleen) / 2, "test/dice/liver": liver, "test/dice/spleen": spleen}
    )


def test_existing_data_module_provides_test_and_prediction(trainer: Make) -> None:
    class Data(pl.LightningDataModule):
        def test_dataloader(self) -> Any:
            return DataLoader(Images(5, labelled=True), 2)

        def predict_dataloader(self) -> Any:
            return DataLoader(Images(5), 2)

    module = APLModule(TinyNet(), CLASSES)
    wrapped = TargetDataModule.from_datamodule(Data())
    assert "test/dice" in trainer().test(module, wrapped, verbose=False)[0]
    predictions: Any = trainer().predict(module, wrapped)
    assert torch.equal(torch.cat(predictions), expected_labels(module))


def test_test_without_labels_is_an_error(trainer: Make) -> None:
    with pytest.raises(ValueError, match="Expected labels in the batches, but got none: pass `label_key`"):
        trainer().test(APLModule(TinyNet(), CLASSES), DataLoader(Images(2)), verbose=False)


def test_refinement_module_is_abstract() -> None:
    with pytest.raises(TypeError, match="losses"):
        RefinementModule(TinyNet(), CLASSES)  # type: ignore[abstract]


def test_an_index_of_the_project_is_not_that_of_the_data_set(trainer: Make) -> None:
    """Slice numbers repeat in each patient; all slices count."""
    slices = [
        {"image": image, "label": label, "case": f"patient {number // 2}", "index": number % 2}
        for number, (image, label) in enumerate(Images(4, labelled=True))
    ]
    module, images = APLModule(TinyNet(), CLASSES), Images(4, labelled=True)
    with torch.no_grad():
        labels = module.eval()(torch.stack([image for image, _ in images])).main.argmax(1)
    dice = CaseDice(CLASSES)
    dice.update(labels, torch.stack([label for _, label in images]), [sample["case"] for sample in slices])
    (found,) = trainer().validate(module, DataLoader(slices, 2), verbose=False)
    assert found["val/dice"] == pytest.approx(dice.compute()[1:].mean().item())


def test_a_failed_validation_does_not_count_in_the_next_one(trainer: Make) -> None:
    module, good = APLModule(TinyNet(), CLASSES), DataLoader(Images(2, labelled=True))
    (expected,) = trainer().validate(module, good, verbose=False)
    other, (image, label) = (Images(3, labelled=True)[2], Images(1, labelled=True)[0])
    with pytest.raises(ValueError, match="between 0 and 2"):
        trainer().validate(module, DataLoader([other, (image, label + 9)]), verbose=False)
    assert trainer().validate(module, good, verbose=False) == [expected]


def test_a_trainer_on_one_device_waits_for_no_other_rank(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after DDP in the same script, where rank 0 alone evaluates, and the process group is still there."""
    module, data = APLModule(TinyNet(), CLASSES), DataLoader(Images(2, labelled=True))
    expected = trainer().validate(module, data, verbose=False)

    def hang(*_: Any) -> None:
        raise AssertionError("waits for other ranks")

    monkeypatch.setattr("apl_lightning._support.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("torch.distributed.all_gather_object", hang)
    monkeypatch.setattr("torch.distributed.all_reduce", hang)
    assert trainer().validate(module, data, verbose=False) == expected


def test_prediction_of_images_some_of_which_have_labels(trainer: Make) -> None:
    module = APLModule(TinyNet(), CLASSES)
    mixed = [sample if number % 2 else sample[0] for number, sample in enumerate(Images(5, labelled=True))]
    found: Any = trainer().predict(module, TargetDataModule(predict=mixed, batch_size=5))
    assert torch.equal(torch.cat(found), expected_labels(module))


def test_images_of_different_sizes_need_a_batch_size_of_1(trainer: Make) -> None:
    sizes = [Images(1, size, labelled=True)[0] for size in ((16, 16), (8, 16))]
    module = APLModule(TinyNet(), CLASSES)
    with pytest.raises(ValueError, match="of one size in a batch, but got .*pass val_batch_size=1"):
        trainer().validate(module, TargetDataModule(val=sizes), verbose=False)
    trainer().validate(module, TargetDataModule(val=sizes, val_batch_size=1), verbose=False)


def test_class_that_never_occurs_in_validation(trainer: Any) -> None:
    class Never2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier = nn.Conv2d(1, 2, 1), nn.Conv2d(2, CLASSES, 1)
            self.classifier.bias.data[:] = torch.tensor([-1e3, 0.0, -1e3])

        def forward(self, image: Tensor) -> Tensor:
            return self.classifier(self.body(image))

    samples = [(image, label.clamp(max=1)) for image, label in Images(3, labelled=True)]
    module = APLModule(Never2(), CLASSES, ["background", "liver", "spleen"])
    (found,) = trainer().validate(module, torch.utils.data.DataLoader(samples, 3), verbose=False)
    assert found.keys() == {"val/dice", "val/dice/liver"}
    assert found["val/dice"] == found["val/dice/liver"] > 0

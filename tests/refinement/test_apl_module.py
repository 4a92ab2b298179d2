"""APLModule: which parameters each loss trains, Trainer options, checkpoints and export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import CLASSES, Images, TinyNet
from monai.networks.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.losses import balanced_weights, consistency_loss, weighted_dice_loss

Make = Callable[..., pl.Trainer]


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    return {
        "image": torch.rand(count, 1, 16, 16),
        "pseudo_label": torch.randint(CLASSES, (count, 16, 16)),
        "weight": torch.rand(count, 16, 16),
    }


def state(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def same(before: list[torch.Tensor], parameters: list[nn.Parameter]) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, partial(torch.optim.AdamW, weight_decay=0.1)])
@pytest.mark.parametrize("only", ["consistency", "refinement"])
def test_each_loss_trains_only_its_parameters(only: str, optimizer: Any) -> None:
    other = {"consistency": "refinement_weight", "refinement": "consistency_weight"}[only]
    module = APLModule(TinyNet(), CLASSES, optimizer=optimizer, learning_rate=0.1, weighting="none", **{other: 0.0})
    heads, encoder = module.model.head_parameters(), module.model.encoder_parameters()
    before = {"heads": state(heads), "encoder": state(encoder)}
    step = module.configure_optimizers()
    module.losses(batch())["loss"].backward()
    step.step()
    assert same(before["encoder"], encoder) == (only == "consistency")
    assert same(before["heads"], heads) == (only == "refinement")


def test_both_losses_in_one_pass_equal_two_optimisers() -> None:
    """One pass gives the gradients of Algorithm 1, which has two passes and two disjoint optimisers."""
    options = {"optimizer": torch.optim.SGD, "learning_rate": 0.1, "head_rate": 1.0, "aux": "encoder.2"}
    module = APLModule(TinyNet(), CLASSES, **options)
    data = batch()
    heads, encoder = module.model.head_parameters(), module.model.encoder_parameters()
    main, aux = module.model(data["image"])
    for_heads = torch.autograd.grad(consistency_loss(main, aux), heads)
    main, aux = module.model(data["image"])
    w = data["weight"]
    labels = data["pseudo_label"]
    losses = [(w * F.cross_entropy(z, labels, reduction="none")).sum() / w.sum() for z in (main, aux)]
    losses += [weighted_dice_loss(z, labels, balanced_weights(labels, w, CLASSES)) for z in (main, aux)]
    for_encoder = torch.autograd.grad(sum(losses) / 2, encoder)
    module.losses(data)["loss"].backward()
    for parameter, expected in zip(heads + encoder, for_heads + for_encoder, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)


class Attention(nn.Module):
    """Self-attention over rows, with dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows = features.mean(dim=3).transpose(1, 2)
        attended: torch.Tensor = self.attention(rows, rows, rows)[0]
        return features + attended.transpose(1, 2)[..., None]


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), DropPath(0.5), StochasticDepth(0.5, "row"), Attention()], ids=type)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("place", ["encoder", "classifier"])
def test_training_uses_dropout_only_if_asked_for(place: str, dropout: bool, layer: nn.Module) -> None:
    network = TinyNet()
    if place == "classifier":
        network.classifier = nn.Sequential(layer, network.classifier)
    else:
        network.encoder.append(layer)
    module = APLModule(network, CLASSES, head="classifier", dropout=dropout, batch_norm="frozen").eval().train()
    given = batch(16)
    first, second = (module.losses(given)["loss"] for _ in range(2))
    assert torch.equal(first, second) != dropout
    assert not module.model.network.encoder[1].training, "BatchNorm has a mode of its own"


def test_dropout_is_not_a_rate() -> None:
    with pytest.raises(TypeError, match="Expected `dropout` to be True or False, but got 0.1: set rates in the layers"):
        APLModule(TinyNet(), CLASSES, dropout=0.1)


@pytest.fixture
def data(tmp_path: Path) -> TargetDataModule:
    return TargetDataModule(Images(6), Images(4, labelled=True), batch_size=2, store_dir=tmp_path / "labels")


def test_logged_names(trainer: Make, data: TargetDataModule) -> None:
    module = APLModule(TinyNet(), CLASSES, ["background", "liver", "spleen"])
    fit = trainer(callbacks=[PseudoLabelCallback()])
    fit.fit(module, data)
    expected = {"train/loss", "train/consistency", "train/refinement", "val/dice", "val/dice/liver", "val/dice/spleen"}
    expected |= {
        "pseudo/confidence",
        "pseudo/apart",
        "pseudo/agreement",
        "pseudo/careful_gain",
        "pseudo/estimated_gain",
        "pseudo/estimated_gain/spleen",
        "pseudo/batch_norm_gain",
    }
    expected |= {f"pseudo/class_ratio/{name}" for name in ("background", "liver", "spleen")}
    assert set(fit.callback_metrics) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
        {"fast_dev_run": True},
        {"limit_train_batches": 1, "detect_anomaly": True},
    ],
)
def test_trainer_options(trainer: Make, data: TargetDataModule, options: dict[str, Any]) -> None:
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.01)
    before = state(list(module.model.parameters()))
    trainer(callbacks=[PseudoLabelCallback()], **options).fit(module, data)
    assert not same(before, list(module.model.parameters()))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_accumulated_gradient_is_the_mean_over_batches(trainer: Make, data: TargetDataModule) -> None:
    gradients = []
    for options in ({"accumulate_grad_batches": 3}, {}):
        torch.manual_seed(0)
        module = APLModule(TinyNet(), CLASSES, optimizer=torch.optim.SGD, learning_rate=0.0)
        collected: list[torch.Tensor] = []

        class Collect(pl.Callback):
            def on_before_optimizer_step(
                self, trainer: Any, module: Any, optimizer: Any, into: list[Any] = collected
            ) -> None:
                into.append(module.model.network.encoder[0].weight.grad.clone())

        trainer(callbacks=[PseudoLabelCallback(), Collect()], **options).fit(module, data)
        gradients.append(torch.stack(collected).mean(0))
        assert len(collected) == (1 if options else 3)
    torch.testing.assert_close(gradients[0], gradients[1])


# Dynamo reads `.grad` when it traces `self.log` of Lightning.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_module_trains(trainer: Make, data: TargetDataModule) -> None:
    torch.manual_seed(0)
    plain = APLModule(TinyNet(), CLASSES, learning_rate=0.01)
    torch.manual_seed(0)
    module = APLModule(TinyNet(), CLASSES, learning_rate=0.01)
    for each in (plain, torch.compile(module, backend="aot_eager")):
        torch.manual_seed(1)
        trainer(callbacks=[PseudoLabelCallback()]).fit(each, data)
    for expected, parameter in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)


def test_checkpoint_restores_the_module(trainer: Make, data: TargetDataModule, tmp_path: Path) -> None:
    module = APLModule(TinyNet(), CLASSES, ["background", "a", "b"], consistency_weight=0.3, learning_rate=0.01)
    fit = trainer(callbacks=[PseudoLabelCallback()])
    fit.fit(module, data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    loaded = APLModule.load_from_checkpoint(tmp_path / "last.ckpt", model=TinyNet())
    assert loaded.consistency_weight == 0.3
    assert loaded.class_names == ["background", "a", "b"]
    image = torch.rand(1, 1, 16, 16)
    assert torch.equal(loaded.eval()(image).aux, module.eval()(image).aux)


def test_export_loads_into_the_plain_network(trainer: Make, data: TargetDataModule) -> None:
    network = TinyNet()
    module = APLModule(network, CLASSES, learning_rate=0.01)
    trainer(callbacks=[PseudoLabelCallback()]).fit(module, data)
    fresh = TinyNet()
    fresh.load_state_dict(module.export().state_dict())
    image = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(fresh.eval()(image), module.eval()(image).main)
    assert not torch.equal(fresh(image), network.eval()(image)), "the original network does not change"


def test_optimizer_and_scheduler(trainer: Make, data: TargetDataModule) -> None:
    module = APLModule(
        TinyNet(),
        CLASSES,
        optimizer=partial(torch.optim.SGD, momentum=0.9),
        learning_rate=0.2,
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1),
    )
    fit = trainer(callbacks=[PseudoLabelCallback()], max_epochs=2)
    fit.fit(module, data)
    (optimizer,) = fit.optimizers
    assert optimizer.param_groups[0]["momentum"] == 0.9
    # The learning rates of encoder and heads, divided by 10 twice.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.002, 0.0002])


def test_logits_are_resized_to_the_image() -> None:
    class Coarse(TinyNet):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(F.avg_pool2d(image, 4))

    module = APLModule(Coarse(), CLASSES)
    assert module(torch.rand(2, 1, 16, 24)).main.shape == (2, CLASSES, 16, 24)
    assert module.model(torch.rand(2, 1, 16, 24)).main.shape == (2, CLASSES, 4, 6)
    assert torch.isfinite(module.losses(batch())["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 4}, r"\(B, 4, ...\) logits.*pass num_classes=3"),
        ({"class_names": ["liver"]}, "3 different `class_names`, background included"),
        ({"class_names": ["other", "kidney", "kidney"]}, "3 different `class_names`, background included"),
        ({"weighting": "entropy"}, "`weighting` to be one of"),
        ({"batch_norm": "sync"}, "`batch_norm` to be one of .*'adapt', 'frozen', 'train'.* but got 'sync'"),
        ({"consistency_weight": -1.0}, "at least 0 and not both 0, but got -1.0"),
        ({"consistency_weight": 0.0, "refinement_weight": 0.0}, "not both 0"),
    ],
)
def test_bad_options_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        APLModule(TinyNet(), **{"num_classes": CLASSES, **options})


def test_validation_without_labels_is_an_error(trainer: Make) -> None:
    with pytest.raises(ValueError, match="evaluation samples to have a label, but sample 0 has none: return"):
        trainer().validate(APLModule(TinyNet(), CLASSES), TargetDataModule(Images(), Images()), verbose=False)


def labelled_batch(soft: bool = False) -> dict[str, Tensor]:
    labels = torch.rand(2, CLASSES, 8, 8).softmax(1) if soft else torch.randint(CLASSES, (2, 8, 8))
    return {"image": torch.rand(2, 1, 8, 8), "pseudo_label": labels, "weight": torch.rand(2, 8, 8)}


def test_weights_of_the_losses() -> None:
    module = APLModule(TinyNet(), CLASSES, consistency_weight=3.0, refinement_weight=0.25, batch_norm="frozen")
    losses = module.losses(labelled_batch())
    torch.testing.assert_close(losses["loss"], 3 * losses["consistency"] + 0.25 * losses["refinement"])

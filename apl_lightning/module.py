"""Refinement as a LightningModule: the two losses, the optimiser, the Dice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from apl_lightning._lightning import LightningModule
from apl_lightning.batchnorm import BatchNormMode, adapt_batch_norm, set_batch_norm_mode
from apl_lightning.dual import DualHeadModel, Inferer, Logits
from apl_lightning.heads import add_dual_heads
from apl_lightning.losses import Weighting, consistency_loss, weighted_cross_entropy
from apl_lightning.metrics import CaseDice
from apl_lightning.resizing import resize_to
from apl_lightning.samples import Keys, split_batch
from apl_lightning.teacher import Teacher
from apl_lightning.warmup import warm_up_second_head


class APLModule(LightningModule):
    r"""Refine a pretrained network on unlabelled target images (Algorithm 1 of the paper).

    $$L = \lambda_{con} L_{Con} + \lambda_{ssl} L_{SSL}$$

    L_Con ([`consistency_loss`][apl_lightning.losses.consistency_loss]) trains only the heads; L_SSL (the mean of
    [`weighted_cross_entropy`][apl_lightning.losses.weighted_cross_entropy] over both heads) trains only the encoder.
    One forward and one backward pass serve both, so automatic optimisation, mixed precision, accumulation, clipping
    and DDP work as in any LightningModule. The pseudo labels come with the batch: train on a
    [`TargetDataModule`][apl_lightning.TargetDataModule] with
    [`PseudoLabelCallback`][apl_lightning.PseudoLabelCallback].

    Args:
        model: A pretrained network or a LightningModule that holds one (copied, not changed), or what
            `add_dual_heads` made of it.
        num_classes: Channels of its logits, background (class 0) included.
        class_names: Names for the log, background included; numbers by default.
        head: Passed to [`add_dual_heads`][apl_lightning.add_dual_heads].
        aux: Passed to `add_dual_heads`.
        example: Passed to `add_dual_heads`.
        network: Passed to `add_dual_heads`: where the network is, if `model` is a LightningModule.
        consistency_weight: $\lambda_{con}$; 0 leaves the heads as they are.
        refinement_weight: $\lambda_{ssl}$; 0 leaves the encoder as it is.
        weighting: The reading of W in L_Con.
        batch_norm: `"adapt"` re-estimates the BatchNorm statistics on the target images before the first round and
            then holds them still; `"frozen"` holds those of the source; `"train"` follows the training batches.
        optimizer: Called with the parameters and `lr`: a class, or a `functools.partial` of one.
        learning_rate: Its learning rate.
        head_rate: The learning rate of the heads as a part of it. L_Con alone trains them, and the step of Adam and its
            kin does not depend on the size of a loss: `consistency_weight` cannot slow them down, this can.
        ema_decay: The network that labels, validates and is exported is the mean over the steps with this decay (see
            [`Teacher`][apl_lightning.teacher.Teacher]); `None` for the network of the last step.
        lr_scheduler: Called with the optimiser; stepped once an epoch.
        inferer: Validates through this callable of images and network, as MONAI's `SlidingWindowInferer`.
        image_key: The key of the image in validation batches that are dictionaries.
        label_key: The key of the label.
        case_key: The key of the case.

    Raises:
        ValueError: If the network does not fit (see `add_dual_heads`), or an option is unknown.

    Examples:
        >>> import torch
        >>> from apl_lightning import APLModule
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1))
        >>> module = APLModule(network, num_classes=5)
        >>> main, aux = module(torch.rand(2, 1, 16, 16))
        >>> refined = module.export()  # same class, same keys as `network`
        >>> list(refined.state_dict()) == list(network.state_dict())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        *,
        head: str | None = None,
        aux: str = "auto",
        example: Tensor | None = None,
        network: str | None = None,
        consistency_weight: float = 1.0,
        refinement_weight: float = 1.0,
        weighting: Weighting = "confusion",
        batch_norm: BatchNormMode = "adapt",
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        learning_rate: float = 3e-4,
        head_rate: float = 0.1,
        ema_decay: float | None = 0.95,
        lr_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        inferer: Inferer | None = None,
        image_key: str = "image",
        label_key: str = "label",
        case_key: str = "case",
    ) -> None:
        super().__init__()
        _check_options(num_classes, class_names, consistency_weight, refinement_weight, weighting, batch_norm)
        if not head_rate > 0:
            raise ValueError(f"Expected `head_rate` to be above 0, but got {head_rate}: see `consistency_weight`.")
        self.save_hyperparameters(ignore=["model", "example", "optimizer", "lr_scheduler", "inferer"])
        self.model = (
            model
            if isinstance(model, DualHeadModel)
            else add_dual_heads(model, num_classes, head, aux, example, network=network)
        )
        if self.model.num_classes != num_classes:
            raise ValueError(f"Expected `num_classes` {self.model.num_classes}, as in `model`, but got {num_classes}.")
        self.teacher = None if ema_decay is None else Teacher(self.model, ema_decay)
        self.class_names = list(class_names) if class_names is not None else [str(c) for c in range(num_classes)]
        self.consistency_weight = consistency_weight
        self.refinement_weight = refinement_weight
        self.weighting: Weighting = weighting
        self.batch_norm: BatchNormMode = batch_norm
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.head_rate = head_rate
        self.lr_scheduler = lr_scheduler
        self.inferer = inferer
        self.keys = Keys(image_key, label_key, case_key)
        self.dice = CaseDice(num_classes)
        # Set by the callback where a denoiser brings a loss of its own: (main, aux, labels, weights).
        self.denoiser_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
        self.train()

    def forward(self, image: Tensor) -> Logits:
        """Logits of both heads at the size of the image, each (B, C, *S): those of the teacher, if there is one."""
        main, aux = self.model(image) if self.teacher is None else self.teacher.model(image)
        return Logits(resize_to(main, image), resize_to(aux, image))

    def train(self, mode: bool = True) -> APLModule:
        """Set training mode, with BatchNorm as `batch_norm` says."""
        super().train(mode)
        if mode:
            set_batch_norm_mode(self.model, self.batch_norm)
        return self

    def prepare_refinement(self, images: Iterable[Tensor]) -> None:
        """What must be done once on all target images before the first pseudo labels: the callback calls it."""
        if self.batch_norm == "adapt":
            adapt_batch_norm(self.model, images, self.inferer)
        if not self.model.warm:
            warm_up_second_head(self.model, images)
        if self.teacher is not None:
            self.teacher.copy(self.model)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`consistency`, `refinement` and their weighted sum `loss` on a batch of `image`, `pseudo_label`, `weight`.

        Where `repeated` (B,) marks samples that only fill up the batch, L_Con leaves them out; their `weight` is 0.
        """
        for_heads, for_encoder = self.model.routed(batch["image"])
        losses = {}
        if self.consistency_weight:
            counted = ~batch["repeated"] if "repeated" in batch else None
            losses["consistency"] = consistency_loss(for_heads.main, for_heads.aux, self.weighting, counted)
        if self.refinement_weight:
            losses["refinement"] = self.loss_on_labels(for_encoder, batch)
        factors = {"consistency": self.consistency_weight, "refinement": self.refinement_weight}
        return {**losses, "loss": torch.stack([factors[name] * value for name, value in losses.items()]).sum()}

    def loss_on_labels(self, logits: Logits, batch: dict[str, Tensor]) -> Tensor:
        """What the pseudo labels ask for: the denoiser's own loss, or the weighted cross-entropy of both heads."""
        labels, weights = batch["pseudo_label"], batch["weight"]
        main, aux = (resize_to(z, weights) for z in logits)
        if self.denoiser_loss is not None:
            return self.denoiser_loss(main, aux, labels, weights)
        return torch.stack([weighted_cross_entropy(z, labels, weights) for z in (main, aux)]).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        """The loss of one batch, logged with its two parts."""
        losses = self.losses(batch)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and let the teacher follow."""
        super().optimizer_step(*arguments, **options)
        if self.teacher is not None:
            self.teacher.follow(self.model)

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Count the Dice of the main head on a labelled batch."""
        image, label, cases = split_batch(batch, self.keys)
        if label is None:
            raise ValueError(
                "Expected labels in the validation batches, but got none: pass `label_key`, or no `val` data."
            )
        logits = self(image) if self.inferer is None else self.inferer(image, self)
        indices = batch.get("index") if isinstance(batch, dict) else None
        self.dice.update(logits[0].max(dim=1).indices, label, cases, indices)

    def on_validation_epoch_end(self) -> None:
        """Log `val/dice/<class>` for each foreground class and their mean as `val/dice`."""
        dice = self.dice.compute()[1:]
        self.dice.reset()
        names = self.class_names[1:]
        values = {f"val/dice/{name}": value for name, value in zip(names, dice, strict=True) if not value.isnan()}
        # Already the same on all ranks; Lightning wants to hear that it may be reduced.
        self.log_dict(values, sync_dist=True)
        self.log("val/dice", dice.nanmean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """One optimiser for the parameters that a loss reaches, the encoder's first."""
        groups: list[dict[str, Any]] = []
        if self.refinement_weight:
            groups.append({"params": self.model.encoder_parameters()})
        if self.consistency_weight:
            groups.append({"params": self.model.head_parameters(), "lr": self.head_rate * self.learning_rate})
        return self._optimize(groups)

    def export(self, average: bool = False) -> nn.Module:
        """The refined network as it came: same class, same state-dict keys (see `DualHeadModel.export`)."""
        if self.teacher is None:
            return self.model.export(average)
        twin = copy.deepcopy(self.model)
        twin.load_state_dict(self.teacher.model.state_dict())
        return twin.export(average)

    def _optimize(self, parameters: list[dict[str, Any]] | list[nn.Parameter]) -> Any:
        optimizer = self.optimizer(parameters, lr=self.learning_rate)
        return optimizer if self.lr_scheduler is None else ([optimizer], [self.lr_scheduler(optimizer)])


def _check_options(
    num_classes: int,
    class_names: Sequence[str] | None,
    consistency_weight: float,
    refinement_weight: float,
    weighting: str,
    batch_norm: str,
) -> None:
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"Expected {num_classes} `class_names`, background included, but got {list(class_names)}.")
    if not (consistency_weight >= 0 and refinement_weight >= 0 and consistency_weight + refinement_weight > 0):
        raise ValueError(
            "Expected `consistency_weight` and `refinement_weight` to be at least 0 and not both 0, but got "
            f"{consistency_weight} and {refinement_weight}."
        )
    for name, value, known in (("weighting", weighting, Weighting), ("batch_norm", batch_norm, BatchNormMode)):
        if value not in get_args(known):
            raise ValueError(f"Expected `{name}` to be one of {get_args(known)}, but got {value!r}.")

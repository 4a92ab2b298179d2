"""What APL, self-training and Tent have in common: the network, its optimiser, and its BatchNorm statistics."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning._support.class_only import class_only
from apl_lightning._support.distributed import refuse_left_over_group, total, world_size
from apl_lightning._support.hyperparameters import without_numpy
from apl_lightning._support.lightning import refuse_half_weights
from apl_lightning._support.lightning_package import refuse_other_package, require_lightning
from apl_lightning._support.modes import not_finite, set_dropout_mode
from apl_lightning._support.resizing import resize_to
from apl_lightning.data import Keys, RandomPatches, sliding_window
from apl_lightning.heads import DualHeadModel, Inferer, Logits, warm_up_second_head
from apl_lightning.metrics import CaseDice
from apl_lightning.refinement.batchnorm import BatchNormMode, adapt_batch_norm, batch_norms, set_batch_norm_mode
from apl_lightning.refinement.batchnorm_choice import BatchNormChoice
from apl_lightning.refinement.evaluation_steps import EvaluationSteps
from apl_lightning.refinement.label_loss import denoiser_of, label_loss
from apl_lightning.refinement.options import check_choice, check_options, with_dual_heads
from apl_lightning.refinement.teacher import Teacher

Optimizer = Callable[..., torch.optim.Optimizer]
Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class RefinementModule(EvaluationSteps, ABC):
    """The base class of all refinement modules.

    A subclass implements `losses` and `configure_optimizers`. Validation logs `val/dice` and `val/dice/<class>`, test
    logs `test/dice` and `test/dice/<class>`, and `trainer.predict` returns label maps. Batches are tensors,
    `(image, label)` or dictionaries.

    Args:
        model: A pretrained network, a LightningModule that contains one, or the result of `add_dual_heads`; it is
            copied, not changed.
        num_classes: The number of classes, background (class 0) included; 2 for a network with one logit.
        class_names: Names for the log, background included; numbers by default.
        head: Passed to [`add_dual_heads`][apl_lightning.add_dual_heads]; not with a network that has two heads.
        aux: Passed to `add_dual_heads`.
        example: Passed to `add_dual_heads`.
        main_output: Passed to `add_dual_heads`.
        network: Passed to `add_dual_heads`.
        batch_norm: `"adapt"` re-estimates the BatchNorm statistics on the target images before the first round and then
            fixes them; `"frozen"` keeps those of the source; `"auto"` (the default) takes those of both with the higher
            estimated Dice (see [`estimate_gain`][apl_lightning.guard.estimate_gain]), or their mean if it differs by
            less than a point; `"train"` updates them with the training batches.
        optimizer: Called with the parameters and `lr`: a class, or a `functools.partial` of one.
        learning_rate: The learning rate.
        dice_weight: The weight of [`weighted_dice_loss`][apl_lightning.losses.weighted_dice_loss] beside the loss of
            the denoiser (not in `TentModule`, which has no labels). Its pixels have
            [`balanced_weights`][apl_lightning.losses.balanced_weights].
        dropout: Whether layers with dropout or stochastic depth are active in training.
        ema_decay: Labels, validation, test, prediction and `export` use an exponential moving average of the network
            with this decay (see [`Teacher`][apl_lightning.refinement.Teacher]); `None` uses the network itself.
        lr_scheduler: Called with the optimiser; steps once an epoch.
        inferer: Runs the module on images for labels, validation, test and prediction, as MONAI's
            `SlidingWindowInferer`; by default made from the `patch_size` of the data module, if that has one.
        image_key: The key of the image in batches that are dictionaries; as in `TargetDataModule`.
        label_key: The key of the label.
        case_key: The key of the case.
        return_probabilities: Whether `trainer.predict` returns a `Prediction` with probabilities for each batch, and
            not labels alone.
        ignore_index: The label of pixels that count in no Dice, such as 255.

    Raises:
        ValueError: If the network is not suitable (see `add_dual_heads`), or an option is out of its range.
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
        main_output: int | None = None,
        network: str | None = None,
        batch_norm: BatchNormMode = "auto",
        optimizer: Optimizer = torch.optim.Adam,
        learning_rate: float = 3e-4,
        dice_weight: float = 0.0,
        dropout: bool = True,
        ema_decay: float | None = None,
        lr_scheduler: Scheduler | None = None,
        inferer: Inferer | None = None,
        image_key: str = "image",
        label_key: str = "label",
        case_key: str = "case",
        return_probabilities: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        require_lightning(self)
        super().__init__()
        self.save_hyperparameters(ignore=["model", "example", "optimizer", "lr_scheduler", "inferer"])
        # Scalars of NumPy in a checkpoint would not load with `weights_only`.
        self.hparams.update({name: without_numpy(value) for name, value in self.hparams.items()})
        check_options(optimizer, dice_weight, dropout)
        check_choice("batch_norm", batch_norm, BatchNormMode)
        self.model = with_dual_heads(model, num_classes, head, aux, example, main_output, network)
        if self.model.num_classes != num_classes:
            raise ValueError(f"Expected `num_classes` {self.model.num_classes}, as in `model`, but got {num_classes}.")
        num_classes = self.model.num_classes
        if class_names is not None and not len(set(class_names)) == len(class_names) == num_classes:
            raise ValueError(
                f"Expected {num_classes} different `class_names`, background included, but got {list(class_names)}."
            )
        self.dice_weight = dice_weight
        self.dropout = dropout
        self.teacher = None if ema_decay is None else Teacher(self.model, ema_decay)
        self.class_names = list(class_names) if class_names is not None else [str(c) for c in range(num_classes)]
        self.batch_norm = batch_norm
        self.optimizer = optimizer
        self.learning_rate = float(learning_rate)
        self.lr_scheduler = lr_scheduler
        self.inferer = inferer
        self._window: Inferer | None = None  # made from the patches of a data module
        self.keys = Keys(image_key, label_key, case_key)
        self.return_probabilities = return_probabilities
        self.ignore_index = ignore_index
        self.dice = CaseDice(num_classes, ignore_index)
        self._batch_norm_choice: BatchNormChoice | None = None
        self._first_step, self._has_stepped = 0, False  # of a fit
        self.choose_parameters()
        self.train()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class; an error if the trainer that asks for it, by `isinstance`, is of the other package."""
        refuse_other_package(self)
        return type(self)

    def setup(self, stage: str) -> None:
        """Refuse to train weights in half precision; without an `inferer`, take one for the data module's patches."""
        if stage == "fit":
            refuse_half_weights(self.trainer)
            refuse_left_over_group(self.trainer.world_size)
        if self.teacher is not None and self.teacher.is_outdated(self.model):
            self.teacher.copy(self.model)
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is not None and self.inferer is self._window:  # no other one was passed
            patches = getattr(datamodule, "patches", None)
            self._window = sliding_window(patches.size) if isinstance(patches, RandomPatches) else None
            self.inferer = self._window

    def on_fit_end(self) -> None:
        """Weights that are loaded into `model` from now on count, and not the teacher of this fit."""
        # The layers that Lightning puts in place of synchronised BatchNorm are in training mode.
        set_batch_norm_mode(self.model, self.batch_norm if self.training else "frozen")
        if self.teacher is not None:
            self.teacher.eval()
            self.teacher.remember(self.model)

    def on_train_start(self) -> None:
        """Note where the fit begins."""
        self._first_step, self._has_stepped = self.trainer.global_step, False

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Refuse steps that pass the teacher by: labels and exported network would stay as they are."""
        if self.teacher is not None and not self._has_stepped and self.trainer.global_step > self._first_step:
            raise RuntimeError(
                f"Expected each step to update the teacher, as `optimizer_step` of {type(self).__name__} does, but an "
                "optimiser has stepped without it: call `super().optimizer_step(...)`, or, in manual optimisation, "
                "`self.update_teacher()` after each step."
            )

    def update_teacher(self) -> None:
        """Average the weights of this step; in manual optimisation, call it after each step of an optimiser."""
        self._has_stepped = True
        if self.teacher is not None:
            self.teacher.update_parameters(self.model)

    def on_interruption(self) -> None:
        """As at the end of a fit: weights that are loaded into `model` from now on count."""
        if self.teacher is not None:
            self.teacher.remember(self.model)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load network and teacher; weights that are loaded into `model` from now on count, and not this teacher."""
        outcome = super().load_state_dict(*arguments, **options)
        if self.teacher is not None:
            self.teacher.remember(self.model)
        return outcome

    @class_only
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, *arguments: Any, **options: Any
    ) -> Any:
        """Load a checkpoint of the trainer; `model=` takes a network of the class that was refined.

        The weights come from the checkpoint, and so do all arguments but `model`, `example`, `optimizer`,
        `lr_scheduler` and `inferer`: pass these again. The other arguments are those of Lightning.

        Raises:
            TypeError: If `model` is missing.
        """
        if "model" not in options:
            raise TypeError(
                "Expected the network, which a checkpoint does not contain, but got no `model`: call "
                f"{cls.__name__}.load_from_checkpoint(path, model=network) with a network of the class that was "
                "refined; its weights do not matter."
            )
        if isinstance(options["model"], DualHeadModel):  # it needs none of the saved options of heads
            options = {"head": None, "aux": "auto", "main_output": None, "network": None, **options}
        return super().load_from_checkpoint(checkpoint_path, *arguments, **options)

    def choose_parameters(self) -> None:
        """Exclude parameters from training; by default all that require gradients are trained."""

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The losses of a training batch by name; training minimises the one called `loss`."""

    def forward(self, image: Tensor) -> Logits:
        """Logits of both heads at the size of the image, each (B, C, *S), from the teacher if there is one.

        Weights that are loaded into `model` reach the teacher when a trainer next runs the module.
        """
        main, aux = self.model(image) if self.teacher is None else self.teacher(image)
        return Logits(resize_to(main, image), resize_to(aux, image))

    def train(self, mode: bool = True) -> "RefinementModule":
        """Set training mode, with BatchNorm as in `batch_norm` and dropout as in `dropout`."""
        super().train(mode)
        if mode:
            set_dropout_mode(self.model, self.dropout)
            set_batch_norm_mode(self.model, self.batch_norm)
        return self

    def prepare_refinement(self, images: Iterable[Tensor]) -> None:
        """Before the first round: take over an earlier fit's teacher, and adapt BatchNorm."""
        if self.teacher is not None and not self.teacher.is_copy:
            self.model.load_state_dict(self.teacher.module.state_dict())
        if self.chooses_batch_norm:
            self._batch_norm_choice = BatchNormChoice(self.model)
        if self.batch_norm in ("auto", "adapt"):
            adapt_batch_norm(self.model, images, self.inferer)
        if self.teacher is not None:
            self.teacher.copy(self.model)

    def warm_up(self, images: Iterable[Tensor]) -> None:
        """Fit a new second head on the images, and copy the result to the teacher."""
        if not self.model.warm:
            warm_up_second_head(self.model, images)
        if self.teacher is not None:
            self.teacher.copy(self.model)

    @property
    def chooses_batch_norm(self) -> bool:
        """Whether the statistics of BatchNorm are to be chosen, and the network has such layers."""
        return self.batch_norm == "auto" and bool(batch_norms(self.model))

    @property
    def awaits_batch_norm(self) -> bool:
        """Whether `choose_batch_norm` is due: there are statistics of the source and re-estimated ones."""
        return self._batch_norm_choice is not None

    def choose_batch_norm(self, gain: float) -> str:
        """Choose the statistics by the estimated gain of Dice of re-estimated ones; returns which, in words."""
        choice, self._batch_norm_choice = self._batch_norm_choice, None
        assert choice is not None
        return choice.choose(self.model, gain)

    def label_loss(self, logits: Logits, batch: dict[str, Tensor]) -> Tensor:
        """The denoiser's loss of both heads on labels and weights, and `dice_weight` times the balanced Dice loss."""
        return label_loss(denoiser_of(self), logits, batch, self.dice_weight)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return the loss of a batch; logs all losses, as means over ranks."""
        losses = self.losses(batch)
        means = total(torch.stack([value.detach() for value in losses.values()])) / world_size()
        self.log_dict({f"train/{name}": mean for name, mean in zip(losses, means, strict=True)}, prog_bar=True)
        return losses["loss"]

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and update the teacher."""
        super().optimizer_step(*arguments, **options)
        self.update_teacher()

    def export(self, average: bool = False) -> nn.Module:
        """The refined plain network in evaluation mode: same class, same state-dict keys (see `DualHeadModel.export`).

        Raises:
            ValueError: If a weight is NaN or infinite.
        """
        model = self.model
        if self.teacher is not None and not self.teacher.is_outdated(model):
            model = copy.deepcopy(model)
            model.load_state_dict(self.teacher.module.state_dict())
        if broken := not_finite(model.state_dict()):
            raise ValueError(
                f"Expected finite weights, but {broken[0]!r} has NaN or infinity: lower the learning rate, or load an "
                "earlier checkpoint."
            )
        return model.export(average).eval()

    def _optimize(self, parameters: list[dict[str, Any]] | list[nn.Parameter]) -> Any:
        optimizer = self.optimizer(parameters, lr=self.learning_rate)
        return optimizer if self.lr_scheduler is None else ([optimizer], [self.lr_scheduler(optimizer)])

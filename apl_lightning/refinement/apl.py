"""Adaptive Pseudo Labeling as a LightningModule: the heads learn to agree, the encoder learns from the labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning.heads import Inferer
from apl_lightning.losses import Weighting, consistency_loss
from apl_lightning.refinement.base import Optimizer, RefinementModule, Scheduler
from apl_lightning.refinement.batchnorm import BatchNormMode
from apl_lightning.refinement.label_loss import check_labelled
from apl_lightning.refinement.options import check_choice


class APLModule(RefinementModule):
    r"""Refine a pretrained network on unlabelled target images (Algorithm 1 of the paper).

    $$L = \lambda_{con} L_{Con} + \lambda_{ssl} L_{SSL}$$

    L_Con ([`consistency_loss`][apl_lightning.losses.consistency_loss]) trains only the heads. L_SSL (the mean over both
    heads of [`weighted_cross_entropy`][apl_lightning.losses.weighted_cross_entropy], and beyond the paper of
    [`weighted_dice_loss`][apl_lightning.losses.weighted_dice_loss]) trains only the encoder.
    One forward and one backward pass serve both, so automatic optimisation, mixed precision, accumulation, clipping
    and DDP work as in any LightningModule. The pseudo labels come with the batch: train on a
    [`TargetDataModule`][apl_lightning.data.TargetDataModule] with
    [`PseudoLabelCallback`][apl_lightning.callback.PseudoLabelCallback]. All arguments that are not listed here are
    those of [`RefinementModule`][apl_lightning.refinement.RefinementModule].

    Args:
        consistency_weight: $\lambda_{con}$; 0 does not train the heads.
        refinement_weight: $\lambda_{ssl}$; 0 does not train the encoder.
        dice_weight: The weight of the Dice loss in L_SSL beside the cross-entropy, which has 1; 0 as in the paper. Its
            pixels have [`balanced_weights`][apl_lightning.losses.balanced_weights].
        weighting: The definition of W in L_Con.
        learning_rate: The learning rate of the encoder.
        head_rate: The learning rate of the heads, relative to `learning_rate`. The steps of Adam do not depend on the
            size of a loss, so `consistency_weight` does not slow the heads down; `head_rate` does.
        dropout: Whether dropout is active in training; `False` trains the network as it makes labels.

    Raises:
        ValueError: If the network is not suitable (see `add_dual_heads`), or an option is out of its range.

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
        main_output: int | None = None,
        network: str | None = None,
        consistency_weight: float = 1.0,
        refinement_weight: float = 1.0,
        dice_weight: float = 1.0,
        weighting: Weighting = "confusion",
        batch_norm: BatchNormMode = "auto",
        optimizer: Optimizer = torch.optim.Adam,
        learning_rate: float = 6e-4,
        head_rate: float = 0.1,
        dropout: bool = False,
        ema_decay: float | None = 0.95,
        lr_scheduler: Scheduler | None = None,
        inferer: Inferer | None = None,
        image_key: str = "image",
        label_key: str = "label",
        case_key: str = "case",
        return_probabilities: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        check_choice("weighting", weighting, Weighting)
        if not (consistency_weight >= 0 and refinement_weight >= 0 and consistency_weight + refinement_weight > 0):
            raise ValueError(
                "Expected `consistency_weight` and `refinement_weight` to be at least 0 and not both 0, but got "
                f"{consistency_weight} and {refinement_weight}."
            )
        if not head_rate > 0:
            raise ValueError(f"Expected `head_rate` to be above 0, but got {head_rate}: see `consistency_weight`.")
        super().__init__(
            model,
            num_classes,
            class_names,
            head=head,
            aux=aux,
            example=example,
            main_output=main_output,
            network=network,
            batch_norm=batch_norm,
            optimizer=optimizer,
            learning_rate=learning_rate,
            dice_weight=dice_weight,
            dropout=dropout,
            ema_decay=ema_decay,
            lr_scheduler=lr_scheduler,
            inferer=inferer,
            image_key=image_key,
            label_key=label_key,
            case_key=case_key,
            return_probabilities=return_probabilities,
            ignore_index=ignore_index,
        )
        self.consistency_weight = consistency_weight
        self.refinement_weight = refinement_weight
        self.weighting: Weighting = weighting
        self.head_rate = float(head_rate)

    def choose_parameters(self) -> None:
        """Without L_Con no loss trains the heads, and DDP must not wait for their gradients."""
        if not self.hparams["consistency_weight"]:
            heads = {id(parameter) for parameter in self.model.head_parameters()}
            self.model.hold_constant(name for name, p in self.model.named_parameters() if id(p) in heads)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`consistency`, `refinement` and their weighted sum `loss` on a batch of `image`, `pseudo_label`, `weight`.

        Samples that only fill up the batch, marked in `repeated` (B,), do not count in L_Con; their `weight` is 0.
        """
        check_labelled(batch)
        for_heads, for_encoder = self.model.routed(batch["image"])
        losses = {}
        if self.consistency_weight:
            counted = ~batch["repeated"] if "repeated" in batch else None
            losses["consistency"] = consistency_loss(for_heads.main, for_heads.aux, self.weighting, counted)
        if self.refinement_weight:
            losses["refinement"] = self.label_loss(for_encoder, batch)
        factors = {"consistency": self.consistency_weight, "refinement": self.refinement_weight}
        return {**losses, "loss": torch.stack([factors[name] * value for name, value in losses.items()]).sum()}

    def configure_optimizers(self) -> Any:
        """One optimiser for the parameters that a loss reaches, first those of the encoder."""
        groups: list[dict[str, Any]] = []
        if self.refinement_weight:
            groups.append({"params": self.model.encoder_parameters()})
        if self.consistency_weight:
            groups.append({"params": self.model.head_parameters(), "lr": self.head_rate * self.learning_rate})
        return self._optimize(groups)

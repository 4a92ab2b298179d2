"""Tent (Wang et al., ICLR 2021): entropy minimisation of the affine parameters of BatchNorm."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from apl_lightning.data import split_batch
from apl_lightning.losses import entropy
from apl_lightning.refinement.base import RefinementModule
from apl_lightning.refinement.batchnorm import BatchNormMode, batch_norms


class TentModule(RefinementModule):
    r"""Minimise the entropy $-\sum_c p_c \log p_c$ of the main head; a baseline without pseudo labels or callback.

    BatchNorm normalises with the statistics of each batch and updates its running statistics (`batch_norm="train"`,
    the default here), or keeps those of the source (`"frozen"`). Only its scales and shifts are trained. Train on
    any loader of images. The arguments are those of
    [`RefinementModule`][apl_lightning.refinement.RefinementModule].

    Raises:
        ValueError: If the network has no BatchNorm with affine parameters, or `batch_norm` is another mode.

    Examples:
        >>> import torch
        >>> from apl_lightning import TentModule
        >>> layers = [torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 5, 1)]
        >>> module = TentModule(torch.nn.Sequential(*layers), num_classes=5)
        >>> [group] = module.configure_optimizers().param_groups
        >>> [tuple(parameter.shape) for parameter in group["params"]]  # scale and shift
        [(8,), (8,)]
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        *,
        batch_norm: BatchNormMode = "train",
        **options: Any,
    ) -> None:
        if batch_norm in ("auto", "adapt"):  # by the callback, which Tent does not need
            raise ValueError(
                f"Expected `batch_norm` of Tent to be 'train' or 'frozen', but got {batch_norm!r}: re-estimate the "
                "statistics before, by `apl_lightning.refinement.adapt_batch_norm`."
            )
        if options.get("dice_weight"):
            raise ValueError(
                f"Expected no `dice_weight`, but got {options['dice_weight']}: Tent has no labels for a Dice loss."
            )
        super().__init__(model, num_classes, class_names, batch_norm=batch_norm, **options)

    def choose_parameters(self) -> None:
        """Train nothing but the scales and shifts."""
        trained = {id(parameter) for parameter in self._affine()}
        self.model.hold_constant(name for name, p in self.model.named_parameters() if id(p) not in trained)
        if not trained:
            raise ValueError(
                "Expected `model` to have BatchNorm layers with scale and shift, which Tent trains, but "
                f"{type(self.model.network).__name__} has none: use another method."
            )

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """`entropy`, which is the `loss`, of a batch in any form."""
        image, _, _ = split_batch(batch, self.keys)
        main, aux = self.model(image)
        mean_entropy = entropy(main).mean()
        # DDP waits for a gradient of every trained parameter: that of an auxiliary branch is 0.
        return {"entropy": mean_entropy, "loss": mean_entropy + 0 * aux.clamp(-1, 1).sum()}

    def configure_optimizers(self) -> Any:
        """One optimiser for the scales and shifts."""
        return self._optimize(self._affine())

    def _affine(self) -> list[nn.Parameter]:
        # Without the second head, which is not used.
        layers = batch_norms(self.model.network)
        return [parameter for layer in layers for parameter in (layer.weight, layer.bias) if parameter is not None]

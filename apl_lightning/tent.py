"""Tent (Wang et al., ICLR 2021): entropy minimisation of BatchNorm's affine parameters, without pseudo labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apl_lightning.batchnorm import batch_norms
from apl_lightning.losses import entropy
from apl_lightning.module import APLModule
from apl_lightning.samples import split_batch


class TentModule(APLModule):
    r"""Minimise the entropy $-\sum_c p_c \log p_c$ of the main head; a baseline that needs no callback.

    BatchNorm normalises with the statistics of each batch, which its running statistics follow, and its scales and
    shifts are all that is trained. Train it on any loader of images.

    Args:
        *arguments: As for [`APLModule`][apl_lightning.APLModule].
        **options: As for `APLModule`, but for `batch_norm`, and with `ema_decay=None` by default.

    Raises:
        ValueError: If the network has no BatchNorm with affine parameters.

    Examples:
        >>> import torch
        >>> from apl_lightning import TentModule
        >>> layers = [torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 5, 1)]
        >>> module = TentModule(torch.nn.Sequential(*layers), num_classes=5)
        >>> [optimized] = module.configure_optimizers().param_groups
        >>> [tuple(parameter.shape) for parameter in optimized["params"]]  # scale and shift
        [(8,), (8,)]
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"ema_decay": None, **options, "batch_norm": "train"})
        trained = {id(parameter) for parameter in self._affine()}
        self.model.hold_constant(name for name, p in self.model.named_parameters() if id(p) not in trained)
        if not trained:
            raise ValueError(
                "Expected `model` to hold BatchNorm layers with scale and shift, which are what Tent trains, but "
                f"{type(self.model.network).__name__} has none: use another method."
            )

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """`entropy`, which is the `loss`, of a batch in any form that a data set gives."""
        image, _, _ = split_batch(batch, self.keys)
        main, _ = self.model(image)
        loss = entropy(main).mean()
        return {"entropy": loss, "loss": loss}

    def configure_optimizers(self) -> Any:
        """One optimiser for the scales and shifts."""
        return self._optimize(self._affine())

    def _affine(self) -> list[torch.nn.Parameter]:
        # Not those of the second head, which plays no part.
        layers = batch_norms(self.model.network)
        return [parameter for layer in layers for parameter in (layer.weight, layer.bias) if parameter is not None]

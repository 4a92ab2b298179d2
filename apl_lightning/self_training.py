"""Self-training as the peers of APL do it: every parameter learns from the pseudo labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apl_lightning.module import APLModule


class SelfTrainingModule(APLModule):
    """Train the whole network on the loss of the pseudo labels, without consistency and without routing.

    The frame in which threshold, CBST, MRNet and the like are defined, to compare them with APL. The loss is the
    denoiser's own where it has one, else the mean over both heads of the weighted cross-entropy.

    Args:
        *arguments: As for [`APLModule`][apl_lightning.APLModule].
        **options: As for `APLModule`, with `ema_decay=None` by default; the weights of its two losses play no part.

    Examples:
        >>> import torch
        >>> from apl_lightning import PseudoLabelCallback, SelfTrainingModule
        >>> from apl_lightning.denoisers import CBST
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1))
        >>> module = SelfTrainingModule(network, num_classes=5)
        >>> callback = PseudoLabelCallback(denoiser=CBST())
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"ema_decay": None, **options})

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`refinement`, which is the `loss`."""
        loss = self.loss_on_labels(self.model(batch["image"]), batch)
        return {"refinement": loss, "loss": loss}

    def configure_optimizers(self) -> Any:
        """One optimiser for all parameters."""
        return self._optimize([parameter for parameter in self.parameters() if parameter.requires_grad])

"""Self-training: every parameter learns from the pseudo labels."""

from typing import Any

from torch import Tensor

from apl_lightning.refinement.base import RefinementModule
from apl_lightning.refinement.label_loss import check_labelled


class SelfTrainingModule(RefinementModule):
    """Train the whole network on the loss of the pseudo labels, without consistency and without gradient routing.

    Thresholds, CBST, MRNet and the like are defined in this setting; use it to compare them with APL. The loss is that
    of the denoiser (by default the weighted cross-entropy, averaged over both heads) plus `dice_weight`, by default 0,
    times the Dice loss. The arguments are those of [`RefinementModule`][apl_lightning.refinement.RefinementModule].

    Examples:
        >>> import torch
        >>> from apl_lightning import PseudoLabelCallback, SelfTrainingModule
        >>> from apl_lightning.denoisers import CBST
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1))
        >>> module = SelfTrainingModule(network, num_classes=5)
        >>> callback = PseudoLabelCallback(denoiser=CBST())
    """

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`refinement`, which is the `loss`."""
        check_labelled(batch)
        loss = self.label_loss(self.model(batch["image"]), batch)
        return {"refinement": loss, "loss": loss}

    def configure_optimizers(self) -> Any:
        """One optimiser for all parameters."""
        return self._optimize([parameter for parameter in self.parameters() if parameter.requires_grad])

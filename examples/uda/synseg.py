"""Train a segmentation network on translated source images, end to end: SynSeg-Net (Huo et al., TMI 2019).

    L = CycleGAN without the identity loss + L_seg(S(G_A(a)), label of a)

One Adam trains G_A, G_B and the segmentation network S, which then segments target images as they are. Implemented from
the paper.
"""

from cyclegan import CycleGANModule
from source_training import segmentation_loss
from torch import Tensor, nn


class SynSegModule(CycleGANModule):
    """CycleGAN with a segmentation network behind G_A.

    Args:
        to_target: Generator G_A from source to target images, both in [-1, 1].
        to_source: Generator G_B from target to source images.
        segmenter: Segmentation network S on images in [-1, 1].
        width: Channels of the first layer of the discriminators.
        learning_rate: Learning rate of Adam for all networks.
    """

    def __init__(
        self,
        to_target: nn.Module,
        to_source: nn.Module,
        segmenter: nn.Module,
        width: int = 64,
        learning_rate: float = 5e-4,
    ) -> None:
        super().__init__(to_target, to_source, width, identity=0.0, learning_rate=learning_rate)
        self.segmenter = segmenter
        self.criterion = segmentation_loss()

    def segmentation_losses(self, fake_target: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The segmentation loss on translated source images; its gradient reaches G_A too."""
        return {"segmentation": self.criterion(self.segmenter(fake_target).float(), label[:, None])}

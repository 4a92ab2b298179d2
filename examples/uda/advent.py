"""Adapt a network by adversarial entropy minimisation: ADVENT (Vu et al., CVPR 2019), implemented from the paper.

The same as AdaptSegNet, but the discriminators see maps of the entropy instead of the probabilities:

    I = -p log2 p / log2 C                              (weighted self-information, one map per class)
"""

import math

from adaptsegnet import AdaptSegNetModule
from torch import Tensor


def self_information(logits: Tensor) -> Tensor:
    """The weighted self-information maps -p log p / log C, (B, C, *S), between 0 and 1 / (e log C)."""
    log_p = logits.log_softmax(dim=1)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


class AdventModule(AdaptSegNetModule):
    """AdaptSegNet on maps of the entropy; the arguments are the same."""

    def maps(self, logits: Tensor) -> Tensor:
        """What the discriminators see: self-information (B, C, *S)."""
        return self_information(logits)

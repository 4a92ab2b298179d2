"""SIFA with a second segmenter on lower features: SIFA-v2 (Chen et al., TMI 2020), implemented from the paper.

The loss is that of SIFA-v1 and the same two losses with lower weights on lower features:

    L = L of SIFA-v1 + 0.1 L_seg(C_ll(E_ll(G(x_s)))) + 0.01 L_adv(C_ll(E_ll(x_t)))

The decoder and the discriminators of images are shared.
"""

from typing import ClassVar

from sifa_v1 import SIFAv1Module


class SIFAv2Module(SIFAv1Module):
    """SIFA-v1 with deep supervision; the segmenter has two levels and the arguments are the same."""

    levels: ClassVar[dict[str, tuple[float, float]]] = {**SIFAv1Module.levels, "seg_ll": (0.1, 0.01)}

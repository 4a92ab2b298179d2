"""Denoisers turn predictions into pseudo labels and weights, one method a file.

The simplest is any callable `(p_main, p_aux) -> (labels, weights)` with the probabilities of both heads, (B, C, *S);
labels are classes (B, *S) or soft ones (B, C, *S), weights are (B, *S) in [0, 1], and 0 ignores a pixel. What a method
needs beyond that, it has:

- `predict(predictor, images)`: its own passes through the network. It returns the probabilities of both heads and
  whatever else the next call shall get.
- `begin(round, num_classes, device)`: a new round begins.
- `observe(...)`, `settle()`, `decide(...)` in place of the call: statistics of the whole data set come first.
  `observe` counts a batch and returns what will be needed of it again, `settle` is called on all ranks after the last
  batch and reduces the counts, and `decide` turns what was returned into labels and weights.
- `loss(main, aux, labels, weights)`: what training minimises on its labels, in place of the weighted cross-entropy.
- `state_dict()` and `load_state_dict(...)`: what a resumed run must know of the rounds before.
"""

from apl_lightning.denoisers.apl import APL
from apl_lightning.denoisers.bdl import BDL
from apl_lightning.denoisers.cbst import CBST
from apl_lightning.denoisers.chebyshev import Chebyshev
from apl_lightning.denoisers.crst import CRST
from apl_lightning.denoisers.dpl import DPL
from apl_lightning.denoisers.iast import IAST
from apl_lightning.denoisers.mrnet import MRNet
from apl_lightning.denoisers.protocol import DatasetDenoiser, Denoiser, denoise, hard_labels
from apl_lightning.denoisers.threshold import Threshold
from apl_lightning.denoisers.upl import UPL

__all__ = [
    "APL",
    "BDL",
    "CBST",
    "CRST",
    "DPL",
    "IAST",
    "UPL",
    "Chebyshev",
    "DatasetDenoiser",
    "Denoiser",
    "MRNet",
    "Threshold",
    "denoise",
    "hard_labels",
]

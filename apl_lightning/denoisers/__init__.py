"""Methods that turn the predictions of both heads into pseudo labels and weights, one per file."""

from apl_lightning.denoisers.apl import APL
from apl_lightning.denoisers.base import DatasetDenoiser, Denoiser, LabelsAndWeights, as_denoiser, denoise
from apl_lightning.denoisers.bdl import BDL
from apl_lightning.denoisers.cbst import CBST
from apl_lightning.denoisers.chebyshev import Chebyshev
from apl_lightning.denoisers.confidence import merge
from apl_lightning.denoisers.crst import CRST
from apl_lightning.denoisers.dpl import DPL
from apl_lightning.denoisers.iast import IAST
from apl_lightning.denoisers.mrnet import MRNet
from apl_lightning.denoisers.predictor import Predictor
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
    "LabelsAndWeights",
    "MRNet",
    "Predictor",
    "Threshold",
    "as_denoiser",
    "denoise",
    "merge",
]

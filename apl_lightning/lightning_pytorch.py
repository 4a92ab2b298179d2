"""The classes of `apl_lightning` for projects that `import lightning`.

Import everything from here in place of `apl_lightning`:

    from apl_lightning.lightning_pytorch import APLModule, PseudoLabelCallback, TargetDataModule
"""

# mypy: disable-error-code="misc"
# Type checkers take the source of these classes for those of `pytorch_lightning`.

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from apl_lightning import callback, data, refinement, visualize
from apl_lightning.data import EpochSampler, LazyDataLoader, RandomAffine, TargetDataset
from apl_lightning.denoisers import APL
from apl_lightning.heads import DualHeadModel, HeadNotFoundError, Logits, add_dual_heads
from apl_lightning.metrics import CaseDice
from apl_lightning.presets import PAPER
from apl_lightning.store import PseudoLabelStore


class RefinementModule(refinement.RefinementModule, LightningModule):
    __doc__ = refinement.RefinementModule.__doc__


class APLModule(refinement.APLModule, RefinementModule):
    __doc__ = refinement.APLModule.__doc__


class SelfTrainingModule(refinement.SelfTrainingModule, RefinementModule):
    __doc__ = refinement.SelfTrainingModule.__doc__


class TentModule(refinement.TentModule, RefinementModule):
    __doc__ = refinement.TentModule.__doc__


class PseudoLabelCallback(callback.PseudoLabelCallback, Callback):
    __doc__ = callback.PseudoLabelCallback.__doc__


class PseudoLabelOverlay(visualize.PseudoLabelOverlay, Callback):
    __doc__ = visualize.PseudoLabelOverlay.__doc__


class TargetDataModule(data.TargetDataModule, LightningDataModule):
    __doc__ = data.TargetDataModule.__doc__


class WrappedDataModule(data.WrappedDataModule, TargetDataModule):
    __doc__ = data.WrappedDataModule.__doc__


TargetDataModule.wrapper = WrappedDataModule

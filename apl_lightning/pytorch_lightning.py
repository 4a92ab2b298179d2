"""The classes of `apl_lightning` for projects that `import pytorch_lightning`.

They are those of `apl_lightning` itself.
"""

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer

from apl_lightning import callback, data, refinement, visualize


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

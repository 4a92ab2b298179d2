"""LightningModules refine a network with two heads: APL, self-training and Tent on one base."""

from apl_lightning.refinement.apl import APLModule
from apl_lightning.refinement.base import RefinementModule
from apl_lightning.refinement.batchnorm import adapt_batch_norm
from apl_lightning.refinement.evaluation_steps import Prediction
from apl_lightning.refinement.self_training import SelfTrainingModule
from apl_lightning.refinement.teacher import Teacher
from apl_lightning.refinement.tent import TentModule

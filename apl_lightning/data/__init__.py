"""Target images meet the pseudo labels of the current round, and move together with them."""

from apl_lightning.data.datamodule import TargetDataModule
from apl_lightning.data.dataset import EvaluationDataset, TargetDataset
from apl_lightning.data.loader import LazyDataLoader, collate
from apl_lightning.data.random_affine import RandomAffine
from apl_lightning.data.sample_format import Keys, split_batch
from apl_lightning.data.sampler import DrawnSample, EpochSampler

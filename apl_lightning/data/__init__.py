"""Data sets and loaders join target images with the pseudo labels of the current round; transforms move both."""

from apl_lightning.data.datamodule import TargetDataModule
from apl_lightning.data.dataset import EvaluationDataset, TargetDataset
from apl_lightning.data.fingerprints import check_fingerprint, fingerprint
from apl_lightning.data.joined_datasets import read_joined
from apl_lightning.data.loader import LazyDataLoader, collate
from apl_lightning.data.project import WORKER_OPTIONS
from apl_lightning.data.random_affine import RandomAffine
from apl_lightning.data.random_patches import RandomPatches, sliding_window
from apl_lightning.data.sample_format import Keys, describe, length_of, read_sample, split_batch
from apl_lightning.data.sampler import DrawnSample, EpochSampler
from apl_lightning.data.wrapped import WrappedDataModule
from apl_lightning.nifti import NiftiFolder

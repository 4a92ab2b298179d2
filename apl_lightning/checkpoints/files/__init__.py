"""Readers for the checkpoint file formats of PyTorch and TensorFlow."""

from apl_lightning.checkpoints.files.sifa_bundle import read_sifa_bundle
from apl_lightning.checkpoints.files.tensorflow_bundle import is_bundle
from apl_lightning.checkpoints.files.torch_file import read_torch_file

"""Readers for the checkpoint file formats of PyTorch and TensorFlow."""

from apl_lightning.checkpoints.files.reading import read_tensors

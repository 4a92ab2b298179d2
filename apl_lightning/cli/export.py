"""A refined network as a plain file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apl_lightning._support.files import new_file, save_weights
from apl_lightning._support.packages import package
from apl_lightning.checkpoints import load_weights
from apl_lightning.folders import network_of_yaml
from apl_lightning.heads import DualHeadModel, example_input


def export(
    network: nn.Module | str | Path,
    checkpoint: str | Path,
    out: str | Path,
    size: Sequence[int] | None = None,
    prefix: str | None = None,
) -> None:
    """Write the plain network of a checkpoint: a state dict (`.pt`, `.pth`), or an ONNX model (`.onnx`).

    Args:
        network: A network of the class that was refined, or a YAML file with its `class_path` and `init_args`; its
            weights do not matter. That of one of the seven systems is `apl_lightning.checkpoints.load` with the file
            that was refined.
        checkpoint: A checkpoint of the trainer, or any file with the weights of the network.
        out: A new file. An ONNX model takes images (B, C, *S) in batches of any size.
        size: The spatial size of images for an ONNX model; by default one that the network accepts.
        prefix: What precedes the keys, if the checkpoint has several networks of this class.

    Raises:
        ImportError: If `out` is an ONNX model, and onnx or onnxscript is missing.
        FileExistsError: If `out` exists.
        ValueError: If it has another ending, or `network` is another file.
    """
    out = new_file(out)
    if out.suffix not in (".pt", ".pth", ".onnx"):
        raise ValueError(f"Expected `out` to end with .pt, .pth or .onnx, but got {out.name}.")
    if out.suffix == ".onnx":
        package("onnxscript", "onnx", "a file .onnx needs onnx")  # before the work begins
    network = network_of_yaml(network)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"Expected `network` to be a class or a YAML file with one, but got {network}: for a checkpoint of the "
            "seven systems, write class_path: apl_lightning.checkpoints.load and its init_args (system, path and "
            "num_classes)."
        )
    network = network.export() if isinstance(network, DualHeadModel) else network
    load_weights(network, checkpoint, prefix)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix != ".onnx":
        save_weights(network, out)
        return
    example = example_input(network, size)
    batch = torch.export.Dim("batch")
    options: Any = {"dynamo": True, "external_data": False, "verbose": False}  # one file
    torch.onnx.export(network, (example,), out, dynamic_shapes=({0: batch},), **options)
    sys.stdout.write(f"{out} takes images of shape (B, {', '.join(map(str, example.shape[1:]))})\n")

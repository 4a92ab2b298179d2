"""Read SIFA's TensorFlow variables with the names and the memory layout of the PyTorch networks."""

import re
from pathlib import Path

import torch
from torch import Tensor

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.files.tensorflow_bundle import Bundle
from apl_lightning.checkpoints.networks import ENCODER_BLOCKS

# Indices of the convolution and the batch norm in `layer`, for the two halves of a residual block.
_HALVES = {"c1": (0, 2), "c2": (4, 6)}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_CONVOLUTION = {"weights": "weight", "biases": "bias"}


def read_sifa_bundle(path: str | Path) -> dict[str, Tensor]:
    """Read SIFA's target segmenter (`enc.`, `seg.`, `seg_ll.`) and generator (`g_A.`) from a bundle.

    Skips the discriminators, the decoder and the optimizer state. Also skips the biases of the dilated blocks, which
    the official graph does not use. Raises as `Bundle` does, and a `CheckpointError` if there is no variable of SIFA.
    """
    bundle = Bundle(path)
    names = {name: key for name in bundle.entries if (key := _key(name)) is not None}
    if not names:
        others = list(bundle.entries)
        raise CheckpointError(
            f"Expected variables of SIFA such as Model/e_B/c1/Conv/weights, but {bundle.prefix} contains "
            f"{', '.join(others[:3]) or 'none'}{f' and {len(others) - 3} more' if len(others) > 3 else ''}: SIFA is "
            "the only TensorFlow network that can be loaded."
        )
    return {key: _torch_layout(torch.tensor(bundle.read(name)), name) for name, key in names.items()}


def _key(name: str) -> str | None:
    """Convert the name of a variable to a key of the state dict, or to `None` if the networks do not use it."""
    if name.endswith(("/Adam", "/Adam_1")):
        return None
    match name.split("/"):
        case ["Model", "e_B", block, *rest] if block in ENCODER_BLOCKS:
            half, rest = (rest[0], rest[1:]) if rest and rest[0] in _HALVES else ("c1", rest)
            return _layer_key(f"enc.model.{ENCODER_BLOCKS.index(block)}.layer", *_HALVES[half], rest)
        case ["Model", ("s_B" | "s_B_ll") as head, "c8", "Conv", "weights"]:
            return f"{'seg' if head == 's_B' else 'seg_ll'}.model.0.layer.0.weight"
        case ["Model", "g_A", block, half, *rest] if found := re.fullmatch(r"r(\d+)", block):
            return _generator_key(f"blocks.{int(found[1]) - 1}.{half}", rest)
        case ["Model", "g_A", layer, *rest]:
            return _generator_key(layer, rest)
    return None


def _layer_key(prefix: str, convolution: int, norm: int, rest: list[str]) -> str | None:
    match rest:
        case ["Conv", "weights"] | ["weights"]:
            return f"{prefix}.{convolution}.weight"
        case ["batch_norm", "BatchNorm", parameter] if parameter in _NORM:
            return f"{prefix}.{norm}.{_NORM[parameter]}"
    return None


def _generator_key(layer: str, rest: list[str]) -> str | None:
    match rest:
        case [("Conv" | "Conv2d_transpose"), parameter] if parameter in _CONVOLUTION:
            return f"g_A.{layer}.{'' if layer == 'c6' else 'conv.'}{_CONVOLUTION[parameter]}"
        case ["instance_norm", "InstanceNorm", parameter] if parameter in _NORM:
            return f"g_A.{layer}.norm.{_NORM[parameter]}"
    return None


def _torch_layout(tensor: Tensor, name: str) -> Tensor:
    """Convert kernels (H, W, in, out) to (out, in, H, W), and transposed (H, W, out, in) to (in, out, H, W)."""
    return tensor.permute(3, 2, 0, 1).contiguous() if name.endswith("weights") and tensor.ndim == 4 else tensor

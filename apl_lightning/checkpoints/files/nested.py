"""Collect the tensors in nested dictionaries and lists."""

from pathlib import Path

import torch
from torch import Tensor, nn

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.names import plain_name

# These limits are far above any real checkpoint. They bound memory and time on malicious files.
_MAX_ENTRIES = 100_000
_MAX_NAME_LENGTH = 1_000
_MAX_SHARING = 16  # copies of a network in one file may share their values
# What training scripts save beside the network: its moments have the shapes of parameters.
_NO_NETWORK = ("optim", "lr_sched", "sched")


def tensors_by_name(content: object, path: Path) -> dict[str, Tensor]:
    """All tensors in the content of a file, by their keys joined with dots, for example `state_dict.conv1.weight`.

    No tensors, two with the same name, tensors that are not dense, and content beyond the limits are a
    `CheckpointError`.
    """
    tensors: dict[str, Tensor] = {}
    num_entries, num_bytes = 0, 0
    pending: list[tuple[str, object]] = [("", content)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            if kind := _unusual(value):
                raise CheckpointError(
                    f"Expected dense tensors, but {name} in {path} {kind}: save the state dict of the network alone, "
                    "with dense floating-point tensors."
                )
            if name in tensors:
                raise CheckpointError(
                    f"Expected unique keys, but {path} contains {name} twice: save the state dict alone."
                )
            tensors[name] = value
            num_bytes += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple):
            num_entries += len(value)
            pending += reversed(_named_items(value, name))
        if num_entries > _MAX_ENTRIES or len(name) > _MAX_NAME_LENGTH:
            raise CheckpointError(
                f"Expected a state dict, but the dictionaries in {path} are too large, nested too deeply or contain "
                "themselves: save the state dict alone."
            )
        if num_bytes > _MAX_SHARING * path.stat().st_size:
            raise CheckpointError(
                f"Expected tensors that fit into their file, but {name} of shape {tuple(tensors[name].shape)} in "
                f"{path} repeats its values: save tensor.clone() of expanded tensors."
            )
    if not tensors:
        raise CheckpointError(
            f"Expected a state dict, but {path} contains a {type(content).__name__} without tensors: "
            "save `network.state_dict()`."
        )
    if isinstance(content, Tensor):
        raise CheckpointError(f"Expected a state dict, but {path} contains one tensor: save `network.state_dict()`.")
    return tensors


def _named_items(
    value: dict[object, object] | list[object] | tuple[object, ...], name: str
) -> list[tuple[str, object]]:
    """The items of a dictionary or list with joined keys; one with a key that is no string or integer has no tensors.

    What a training script saves of its optimiser is left out.
    """
    prefix = f"{name}." if name else ""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        (prefix + plain_name(str(key)[: _MAX_NAME_LENGTH + 1]), item)
        for key, item in items
        if isinstance(key, str | int)
        and not (not name and str(key).startswith(_NO_NETWORK) and not isinstance(item, Tensor))
    ]


def _unusual(tensor: Tensor) -> str:
    """Say why a tensor is not a dense tensor with values; an empty string if it is one."""
    if tensor.is_meta:
        return "is on the meta device, which has no values"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"has the layout {'nested' if tensor.is_nested else tensor.layout}"
    return "" if type(tensor) in (Tensor, nn.Parameter) else f"is a {type(tensor).__name__}"

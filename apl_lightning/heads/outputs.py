"""The tensors in a network's output, in any nest of tuples, lists and dicts."""

import torch
from torch import Tensor


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def channels_of(output: object, num_classes: int, selected: bool = False) -> int:
    """The channels of the logit maps in a network's output: `num_classes`, or 1 for the one logit of a binary network.

    A map with one channel beside others may be an edge or a depth, so it counts only if the user has `selected` it.
    """
    channels = {tensor.shape[1] for tensor in _maps(output)}
    binary = channels == {1} or (selected and 1 in channels and num_classes not in channels)
    return 1 if num_classes == 2 and binary else num_classes


def logit_maps(output: object, channels: int) -> list[Tensor]:
    """All logit maps in a network's output, of shape (B, channels, *S).

    The one logit z of a binary network becomes the logits (0, z) of two classes, whose softmax is the sigmoid of z.
    """
    maps = [tensor for tensor in _maps(output) if tensor.shape[1] == channels]
    return [torch.cat([torch.zeros_like(z), z], dim=1) for z in maps] if channels == 1 else maps


def within_unit_interval(maps: Tensor) -> bool:
    """Whether all values may be probabilities."""
    return bool(maps.min() >= 0 and maps.max() <= 1)


def are_probabilities(maps: Tensor) -> bool:
    """Whether the values (B, C, *S) come from a softmax, or from a sigmoid that is sure of some pixels."""
    if not within_unit_interval(maps):
        return False
    return sum_to_one(maps) or bool(maps.min() < 0.05 and maps.max() > 0.95)


def sum_to_one(maps: Tensor, tolerance: float = 1e-2) -> bool:
    """Whether values (B, C, *S) are at least 0 and sum to 1 over the classes, as those of a softmax; NaN does not."""
    return bool((maps.min() >= 0) & ((maps.float().sum(dim=1) - 1).abs().max() <= tolerance))


def shapes_of(output: object) -> str:
    """The shapes in a network's output, for messages."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    if isinstance(output, dict):
        return "{" + ", ".join(f"{key!r}: {shapes_of(value)}" for key, value in output.items()) + "}"
    if isinstance(output, list | tuple):
        return "[" + ", ".join(shapes_of(item) for item in output) + "]"
    return type(output).__name__


def explain_wrong_classes(output: object, num_classes: int, shape: tuple[int, ...]) -> str:
    """The message for an output without logits of `num_classes` channels, for an input of `shape`."""
    if isinstance(output, dict) and any("queries" in str(key) for key in output):
        return (
            f"Expected `model` to give every pixel {num_classes} class scores, but it returns queries, "
            f"{shapes_of(output)}, whose classes and masks are matched later: use a network with a classifier per "
            "pixel (Segformer, UperNet, DPT, a U-Net)."
        )
    channels = {tensor.shape[1] for tensor in _maps(output) if tensor.ndim == len(shape)}
    if len(channels) == 1:
        cure = f"pass num_classes={max(2, *channels)}"
    elif num_classes == 2 and 1 in channels:
        cure = "pass `main_output`, the index of the foreground's logits among the outputs with one channel"
    elif channels:
        cure = "pass `num_classes`, the channels of its logits"
    else:
        cure = "return logits with a channel dimension"
    return (
        f"Expected `model` to return (B, {num_classes}, ...) logits, but got {shapes_of(output)} for an input of shape "
        f"{shape}: {cure}."
    )


def _maps(output: object) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.ndim >= 3 and tensor.is_floating_point()]

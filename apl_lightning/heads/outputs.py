"""The tensors in a network's output, in any nest of tuples, lists and dicts."""

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


def logit_maps(output: object, num_classes: int) -> list[Tensor]:
    """All tensors of shape (B, num_classes, *S) in a network's output."""
    return [tensor for tensor in tensors_in(output) if tensor.ndim >= 3 and tensor.shape[1] == num_classes]


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
    single = isinstance(output, Tensor) and output.ndim == len(shape)
    cure = f"pass num_classes={output.shape[1]}" if single and isinstance(output, Tensor) else "see `num_classes`"
    return (
        f"Expected `model` to return (B, {num_classes}, ...) logits, but got {shapes_of(output)} for an input of shape "
        f"{shape}: {cure}."
    )

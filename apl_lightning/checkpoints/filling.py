"""Put the tensors of a file into a network."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from apl_lightning._support.modes import not_finite
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.match import shorten
from apl_lightning.checkpoints.names import plain_name


def fill(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: str | Path) -> nn.Module:
    """Load the tensors below a prefix into a network, which it returns in evaluation mode; others keep their values.

    NaN, infinity, negative variances and integers in place of weights are a `CheckpointError` that names the file.
    """
    initial = network.state_dict()
    found = {}
    for name, value in initial.items():
        saved = prefix + plain_name(name)
        if isinstance(value, Tensor) and saved in tensors:
            found[name] = (tensors[saved], value)
    if kept := [name for name, value in initial.items() if not isinstance(value, Tensor)]:
        warnings.warn(
            f"{type(network).__name__} keeps more than tensors in its state dict, and {shorten(kept, 3)} stays as it "
            "is in the network that you pass: set it yourself if the file has another one.",
            stacklevel=3,
        )
    if whole := [
        name for name, (ours, theirs) in found.items() if theirs.is_floating_point() and not ours.is_floating_point()
    ]:
        raise CheckpointError(
            f"Expected floating-point weights, but {path} has integers in {shorten(whole, 3)}, as quantised networks "
            "do: save the network before it is quantised."
        )
    # Large 64-bit values become infinite here.
    state = {name: ours.to(theirs.dtype) for name, (ours, theirs) in found.items()}
    parameters = {name for name, _ in network.named_parameters()} & state.keys()
    masked = [name for name in parameters if bool((state[name] == -math.inf).any())]  # buffers may be masks
    if damaged := not_finite(state) or sorted(masked):
        raise CheckpointError(
            f"Expected finite weights, but {path} contains NaN or infinity in {shorten(damaged, 3)}: use an earlier "
            "checkpoint."
        )
    if negative := [name for name, value in state.items() if name.endswith("running_var") and bool((value < 0).any())]:
        raise CheckpointError(
            f"Expected variances of at least 0, but {path} has less in {shorten(negative, 3)}: use an earlier "
            "checkpoint."
        )
    network.load_state_dict({**initial, **state})
    return network.eval()

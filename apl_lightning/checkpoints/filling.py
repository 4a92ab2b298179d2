"""Put the tensors of a file into a network."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from apl_lightning._support.modes import not_finite
from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.match import shorten


def fill(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: str | Path) -> nn.Module:
    """Load the tensors below a prefix into a network, which it returns in evaluation mode; others keep their values.

    NaN, infinity and integers in place of weights are a `CheckpointError` that names the file.
    """
    initial = network.state_dict()
    expected = {name: value for name, value in initial.items() if isinstance(value, Tensor)}
    found = {name: (tensors[prefix + name], value) for name, value in expected.items() if prefix + name in tensors}
    if whole := [
        name for name, (ours, theirs) in found.items() if theirs.is_floating_point() and not ours.is_floating_point()
    ]:
        raise CheckpointError(
            f"Expected floating-point weights, but {path} has integers in {shorten(whole, 3)}, as quantised networks "
            "do: save the network before it is quantised."
        )
    # Large 64-bit values become infinite here.
    state = {name: ours.to(theirs.dtype) for name, (ours, theirs) in found.items()}
    if damaged := not_finite(state):
        raise CheckpointError(
            f"Expected finite weights, but {path} contains NaN or infinity in {shorten(damaged, 3)}: use an earlier "
            "checkpoint."
        )
    network.load_state_dict({**initial, **state})
    return network.eval()

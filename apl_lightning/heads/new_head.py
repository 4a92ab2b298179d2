"""Build the module of a second head: a perturbed copy, a re-initialised copy, or a reader of another layer."""

import copy

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating, hooked
from apl_lightning.heads.gradient_hooks import FeatureTap
from apl_lightning.heads.outputs import shapes_of

_PERTURBATION = 0.1


def perturbed(head: nn.Module) -> nn.Module:
    """A copy of the head with Gaussian noise of a tenth of the root mean square of each parameter."""
    twin = copy.deepcopy(head)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.square().mean().sqrt() * _PERTURBATION)
    return twin


def reinitialised(head: nn.Module) -> nn.Module:
    """A copy of the head with new weights."""
    twin = copy.deepcopy(head)
    for module in twin.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return twin


def reader(network: nn.Module, num_classes: int, path: str, example: Tensor) -> nn.Module:
    """A new 1 x 1 classifier for the features of the layer at `path`."""
    tap = FeatureTap()
    with hooked(network.get_submodule(path), post=tap), evaluating(network), torch.no_grad():
        network(example)
    features = tap.features
    if not isinstance(features, Tensor) or features.ndim != example.ndim:
        raise ValueError(
            f"Expected the layer {path!r} to return features of shape (B, C, *S), but got {shapes_of(features)}: name "
            "another layer in `aux`."
        )
    convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[features.ndim]
    return convolution(features.shape[1], num_classes, 1).to(device=features.device, dtype=features.dtype)

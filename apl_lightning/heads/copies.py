"""Copies of networks that keep tensors of a forward pass, such as MONAI's DynUNet, or any with `weight_norm`."""

from typing import Any

from torch import nn

from apl_lightning._support.lightning import copy_without_trainer
from apl_lightning.heads.outputs import tensors_in


def clean_copy(model: nn.Module) -> nn.Module:
    """A deep copy without trainer, graphs and gradients."""
    return copy_without_trainer(model, without_graphs(model))


def without_graphs(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy` that gives copies without graphs of the tensors that modules keep."""
    kept = (tensor for module in model.modules() for tensor in tensors_in(vars(module)) if not tensor.is_leaf)
    return {id(tensor): tensor.detach().clone() for tensor in kept}

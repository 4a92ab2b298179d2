"""BatchNorm statistics on a new domain."""

from collections import Counter
from collections.abc import Iterable
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from apl_lightning._support.modes import evaluating, hooked, unfixed_modules
from apl_lightning.heads import Inferer

BatchNormMode = Literal["auto", "adapt", "frozen", "train"]


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of the network that track running statistics."""
    layers = (module for module in unfixed_modules(model) if isinstance(module, _BatchNorm))
    return [layer for layer in layers if layer.track_running_stats]


def adapt_batch_norm(model: nn.Module, images: Iterable[Tensor], inferer: Inferer | None = None) -> None:
    """Re-estimate the running statistics of all BatchNorm layers on `images` (AdaBN, Li et al., 2016).

    Each statistic becomes its mean over the batches (B, C, *S), which are best shuffled, weighted by B; the weights of
    the network do not change. An `inferer` runs the network on images, as MONAI's `SlidingWindowInferer`.

    Raises:
        ValueError: If a layer sees one value per channel, as after global pooling of a single image.

    Examples:
        >>> import torch
        >>> from apl_lightning.refinement import adapt_batch_norm
        >>> layer = torch.nn.BatchNorm2d(1)
        >>> adapt_batch_norm(layer, [torch.full((2, 1, 4, 4), 3.0), torch.full((2, 1, 4, 4), 5.0)])
        >>> layer.running_mean
        tensor([4.])
    """
    layers = batch_norms(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    with evaluating(model), torch.no_grad(), hooked(*layers, pre=_CumulativeMean()):
        for layer in layers:
            layer.train()
            if type(layer) is nn.SyncBatchNorm:  # every rank sees all images, so it need not communicate
                layer.forward = MethodType(_BatchNorm.forward, layer)  # type: ignore[method-assign]
        try:
            for batch in images:
                model(batch) if inferer is None else inferer(batch, model)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
                if type(layer) is nn.SyncBatchNorm:
                    del layer.forward


class _CumulativeMean:
    """Before a batch, sets the momentum with which a layer's statistics become the mean over all images so far.

    A layer that no image passes keeps its statistics.
    """

    def __init__(self) -> None:
        self._seen = Counter[_BatchNorm]()

    def __call__(self, layer: _BatchNorm, inputs: tuple[Tensor]) -> None:
        features = inputs[0]
        if features.numel() == features.shape[1]:
            raise ValueError(
                "Expected more than one value per channel to re-estimate the statistics of a BatchNorm layer, but got "
                f'features {tuple(features.shape)}: pass larger images, or keep the statistics (batch_norm="frozen").'
            )
        if layer not in self._seen:
            layer.reset_running_stats()
        self._seen[layer] += len(features)
        layer.momentum = len(features) / self._seen[layer]


def set_batch_norm_mode(model: nn.Module, mode: BatchNormMode) -> None:
    """In a network in training mode, fix running statistics, those of InstanceNorm too, unless `mode` is `"train"`."""
    for module in unfixed_modules(model):
        if isinstance(module, _BatchNorm | _InstanceNorm) and module.track_running_stats:
            module.train(mode == "train")

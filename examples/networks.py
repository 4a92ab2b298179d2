"""Networks of the examples, by name, and their files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

NETWORKS = ("monai-unet", "smp-unet", "smp-deeplabv3plus")


def build_network(name: str, classes: int) -> nn.Module:
    """Build an untrained network with one input channel; each network has BatchNorm layers."""
    if name == "monai-unet":
        return UNet(2, 1, classes, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="batch")
    import segmentation_models_pytorch as smp

    kind, encoder = {"smp-unet": (smp.Unet, "resnet18"), "smp-deeplabv3plus": (smp.DeepLabV3Plus, "resnet50")}[name]
    return kind(encoder, encoder_weights=None, in_channels=1, classes=classes)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Save a state dict; an interrupted run leaves no file that looks finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)

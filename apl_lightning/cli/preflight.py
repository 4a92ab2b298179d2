"""The preflight check of a folder of images."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from apl_lightning._support.device import device_of
from apl_lightning._support.files import new_file
from apl_lightning._support.packages import package
from apl_lightning.data import NiftiFolder
from apl_lightning.folders import as_folder_and_network, as_predictor
from apl_lightning.preflight import preflight as check


def preflight(
    images: NiftiFolder | str | Path,
    network: nn.Module | str | Path,
    num_classes: int,
    system: str | None = None,
    system_options: dict[str, Any] | None = None,
    patch_size: Sequence[int] | None = None,
    picture: str | Path | None = None,
    accelerator: str = "auto",
) -> None:
    """Ask a network whether images look turned or inverted to it, and with BatchNorm also resized or out of range.

    Args:
        images: The images, prepared as for the network, or the path of their folder with default options.
        network: A network, a YAML file with its `class_path` and `init_args`, or a checkpoint of one of the seven
            systems.
        num_classes: The number of classes, background included.
        system: The system of a checkpoint.
        system_options: Further arguments of `load`: `bounds`, `tanh` or `prefix`.
        patch_size: Predict by a sliding window of this size.
        picture: A new file for a picture of the images, as they are and as the network would like them.
        accelerator: `"cpu"`, `"gpu"`, or `"auto"` for a GPU if there is one.
    """
    if picture is not None:
        picture = new_file(picture)
        package("matplotlib", "nifti", "a picture needs matplotlib")
    folder, network = as_folder_and_network(images, network, num_classes, system, system_options)
    module = as_predictor(network, folder, num_classes, None, patch_size).to(device_of(accelerator))
    report = check(module, folder, num_classes=num_classes, inferer=module.inferer)
    sys.stdout.write(f"{report}\n")
    if picture is not None:
        report.picture(picture)

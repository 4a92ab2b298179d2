"""From a folder of images to a folder of label maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from apl_lightning._support.device import device_of
from apl_lightning._support.files import new_folder
from apl_lightning.folders.networks import as_folder_and_network, as_predictor
from apl_lightning.folders.output import write_predictions
from apl_lightning.nifti import NiftiFolder, package


def predict_folder(
    images: NiftiFolder | str | Path,
    network: nn.Module | str | Path,
    out: str | Path,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    system: str | None = None,
    system_options: dict[str, Any] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int = 8,
    accelerator: str = "auto",
) -> None:
    """Label all images of a folder.

    Writes `labels/<case>.nii.gz`, with grid and header of the image, `volumes.csv` (ml of each class and case) and
    `pictures/<case>.png` (the slice with most foreground).

    Args:
        images: A [`NiftiFolder`][apl_lightning.data.NiftiFolder], which says how images are prepared for the network,
            or the path of one with default options.
        network: A network in 2D (for a folder with a `plane`) or 3D, or what `add_dual_heads` makes of it; a YAML file
            with `class_path` and `init_args` of either; or a checkpoint of one of the seven systems.
        out: A new or empty folder.
        num_classes: The number of classes, background included.
        class_names: Names for table and pictures, background included.
        system: The system of a checkpoint (see [`load`][apl_lightning.checkpoints.load]). The `preprocess` of networks
            of the seven systems prepares the images unless the folder has one.
        system_options: Further arguments of `load`: `bounds`, `tanh` or `prefix`.
        patch_size: Predict by a [`sliding_window`][apl_lightning.data.sliding_window] of this size; by default whole
            slices or volumes.
        batch_size: Slices that are predicted at once.
        accelerator: `"cpu"`, `"gpu"`, or `"auto"` for a GPU if there is one.

    Raises:
        ValueError: If `out` has content, the folder has no images, or the network does not fit.
    """
    out = new_folder(out)
    package("matplotlib")  # for the pictures at the end
    device = device_of(accelerator)
    images = images if isinstance(images, NiftiFolder) else NiftiFolder(images, cache=False)  # each is read once
    folder, network = as_folder_and_network(images, network, num_classes, system, system_options)
    module = as_predictor(network, folder, num_classes, class_names, patch_size)
    write_predictions(module, folder, out, batch_size, device)

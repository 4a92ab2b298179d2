"""The network that a folder is labelled with."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning._support.packages import package
from apl_lightning.checkpoints import RawImageNetwork, Translated, load
from apl_lightning.data import sliding_window
from apl_lightning.heads import DualHeadModel, clean_copy, convolution_dimensions
from apl_lightning.nifti import NiftiFolder
from apl_lightning.pytorch_lightning import APLModule


def as_folder_and_network(
    images: NiftiFolder | str | Path,
    network: nn.Module | str | Path,
    num_classes: int,
    system: str | None,
    system_options: dict[str, Any] | None = None,
) -> tuple[NiftiFolder, nn.Module]:
    """The folder, or that of a path with default options, and the network, or that of a file.

    The file is a YAML file of a network's class and arguments, or a checkpoint of a `system`. Unless the folder has a
    `preprocess`, its images get that of a network of the seven systems.

    Raises:
        ValueError: If `network` is a checkpoint and `system` is missing, or the other way round; if the system
            translates images; if a network in 2D is to see volumes, or one in 3D slices.
    """
    network = network_of_yaml(network)
    if not isinstance(network, nn.Module):
        if system is None:
            raise ValueError(
                f"Expected the system that saved {network}, but got none: pass `system` as to "
                "`apl_lightning.checkpoints.load`, or build your network and load its weights."
            )
        if system == "cyclegan":
            raise ValueError(
                "Expected a system that segments, but got 'cyclegan', whose generators translate images: combine one "
                "with your network in `apl_lightning.checkpoints.Translated`."
            )
        network = load(system, network, num_classes, **(system_options or {}))
    elif system is not None or system_options:
        raise ValueError(
            f"Expected a checkpoint with system={system!r}, but got a network: leave out `system` and `system_options`."
        )
    folder = images if isinstance(images, NiftiFolder) else NiftiFolder(images)
    _check_dimensions(folder, network)
    preprocess = _preprocess_of(network.network if isinstance(network, DualHeadModel) else network)
    return folder.with_preprocess(preprocess) if preprocess and not folder.preprocess else folder, network


def network_of_yaml(network: nn.Module | str | Path) -> nn.Module | str | Path:
    """The network whose class and arguments stand in a YAML file; anything else as it is.

    Raises:
        ValueError: If there is no such file, or no network in it.
    """
    if isinstance(network, nn.Module) or Path(network).suffix not in (".yaml", ".yml"):
        return network
    why = "a network in a YAML file needs jsonargparse"
    parser = package("jsonargparse", "cli", why).ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    try:
        content = package("yaml", "cli", why).safe_load(Path(network).expanduser().read_text())
        found: nn.Module = parser.instantiate(parser.parse_object({"network": content})).network
    except Exception as error:  # of the file, of its syntax, or of the class
        raise ValueError(
            f"Expected {network} to have the `class_path` and `init_args` of a network: {error}"
        ) from error
    return found


def as_module(
    network: nn.Module,
    folder: NiftiFolder,
    num_classes: int,
    names: Sequence[str] | None,
    patch_size: Sequence[int] | None,
    **options: Any,
) -> APLModule:
    """The refinement module of a network for the images of a folder, with further `options` of `APLModule`.

    Raises:
        ValueError: If `patch_size` has not one number per dimension, or the network is not suitable.
    """
    image = folder[0]["image"]
    dimensions = image.ndim - 1
    if patch_size is not None and len(patch_size) != dimensions:
        raise ValueError(
            f"Expected a `patch_size` of {dimensions} numbers for images in {dimensions}D, but got {patch_size}: "
            "`plane` of `NiftiFolder` makes slices of volumes."
        )
    inferer = None if patch_size is None else sliding_window(patch_size)
    refine = partial(APLModule, network, num_classes, names, inferer=inferer, **options)
    try:
        return refine()
    except ValueError as refused:  # it may accept no other size than that of its images
        noise = torch.rand(2, len(image), *(patch_size or image.shape[1:]), generator=torch.Generator().manual_seed(0))
        try:
            return refine(example=noise.to(next(network.parameters(), noise)))
        except Exception:
            is_option = any(f"`{name}`" in str(refused) for name in ("head", "main_output", "example", "network"))
            cure = " These are options of `add_dual_heads`, whose result is a network here too." if is_option else ""
            raise type(refused)(f"{refused}{cure}") from None


def as_predictor(network: nn.Module, *arguments: Any) -> APLModule:
    """The module of a network that is not trained and may be frozen, with the arguments of `as_module`."""
    return as_module(clean_copy(network).requires_grad_(True), *arguments)


def _preprocess_of(network: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The `preprocess` of a network of the seven systems, which in `Translated` is that of the generator."""
    first = network.generator if isinstance(network, Translated) else network
    return first.preprocess if isinstance(first, RawImageNetwork) else None


def _check_dimensions(folder: NiftiFolder, network: nn.Module) -> None:
    """Raise a `ValueError` if a folder gives slices to a network whose convolutions are all in 3D, or volumes to 2D."""
    dimensions = convolution_dimensions(network) - {1}  # of attention over channels
    given, cure = 2, "leave out `plane`"
    if folder.preprocessing.plane is None:
        given, cure = 3, '`NiftiFolder(..., plane="axial")` makes slices of volumes'
    if len(dimensions) == 1 and given not in dimensions:
        raise ValueError(
            f"Expected images in {dimensions.pop()}D, as {type(network).__name__} has its convolutions, but those of "
            f"the folder are in {given}D: {cure}."
        )

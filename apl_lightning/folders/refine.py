"""From a folder of unlabelled images and a network to a refined network and its label maps."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apl_lightning._support.device import device_of
from apl_lightning._support.files import claimed, new_folder, save_weights
from apl_lightning._support.lightning import root_device
from apl_lightning._support.random_state import isolated_random_state
from apl_lightning.folders.networks import as_folder_and_network, as_module
from apl_lightning.folders.output import write_predictions
from apl_lightning.folders.trainer import check_images, one_process_trainer
from apl_lightning.nifti import NiftiFolder, package
from apl_lightning.pytorch_lightning import TargetDataModule


def refine_folder(
    images: NiftiFolder | str | Path,
    network: nn.Module | str | Path,
    out: str | Path,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    system: str | None = None,
    system_options: dict[str, Any] | None = None,
    patch_size: Sequence[int] | None = None,
    patches_per_volume: int = 1,
    steps_per_epoch: int | None = 50,
    max_epochs: int = 10,
    batch_size: int | None = None,
    learning_rate: float = 6e-4,
    num_workers: int = 0,
    seed: int = 0,
    accelerator: str = "auto",
    precision: Any = "32-true",
    check: bool = True,
    trainer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """Refine a network on the unlabelled images of a folder, and label them with it.

    Writes `refined.pt` (the state dict of the refined network) and what
    [`predict_folder`][apl_lightning.folders.predict_folder] writes. It is a run of `APLModule`, `TargetDataModule` and
    `PseudoLabelCallback` with their defaults in one process; for anything else, pass the folder to these.

    Args:
        images: A [`NiftiFolder`][apl_lightning.data.NiftiFolder], which says how images are prepared for the network,
            or the path of one with default options. Its labels are not used.
        network: A network in 2D (for a folder with a `plane`) or 3D, or what `add_dual_heads` makes of it; a YAML file
            with `class_path` and `init_args` of either; or a checkpoint of one of the seven systems.
        out: A new or empty folder. During the run pseudo labels lie there too, and your callbacks write there, unless
            `trainer_options` has another `default_root_dir`.
        num_classes: The number of classes, background included.
        class_names: Names for table and pictures, background included.
        system: The system of a checkpoint (see [`load`][apl_lightning.checkpoints.load]). The `preprocess` of networks
            of the seven systems prepares the images unless the folder has one.
        system_options: Further arguments of `load`: `bounds`, `tanh` or `prefix`.
        patch_size: Train on random patches of this size, and predict by a
            [`sliding_window`][apl_lightning.data.sliding_window].
        patches_per_volume: Patches of each image that is read.
        steps_per_epoch: Training batches per epoch; `None` for one pass over the images.
        max_epochs: Epochs; each begins with new labels until these settle (`patience` of `PseudoLabelCallback`).
        batch_size: Images of a training batch; by default 8 slices, 2 volumes with a `patch_size`, or 1 whole volume.
        learning_rate: The learning rate of the encoder (see [`APLModule`][apl_lightning.refinement.APLModule]).
        num_workers: Worker processes that read images.
        seed: The seed of the run.
        accelerator: As in `Trainer`.
        precision: As in `Trainer`, such as `"bf16-mixed"`.
        check: Run [`preflight`][apl_lightning.preflight.preflight] first, which warns of images that look turned or
            inverted to the network, and with BatchNorm also of those resized or out of range.
        trainer_options: Further arguments of `Trainer`, such as a `logger`, or `callbacks` with a
            `PseudoLabelCallback` of your own.

    Returns:
        The refined network in evaluation mode.

    Raises:
        ValueError: If `out` has content, the folder has no images, the network does not fit, or slices differ in size.
    """
    out = new_folder(out)
    package("matplotlib")  # for the pictures at the end
    device_of(accelerator)  # fails here, and not after the images are prepared
    folder, network = as_folder_and_network(images, network, num_classes, system, system_options)
    batch_size = _batch_size(folder, patch_size, batch_size)
    options: dict[str, Any] = {"accelerator": accelerator, "precision": precision, "max_epochs": max_epochs}
    options |= {"enable_model_summary": False, "default_root_dir": out, **(trainer_options or {})}
    root = Path(options["default_root_dir"]).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    with (
        claimed(out),
        tempfile.TemporaryDirectory(dir=root, prefix="labels-") as labels,
        isolated_random_state(cuda=True),
    ):
        torch.manual_seed(seed)
        trainer = one_process_trainer(options)
        module = as_module(network, folder, num_classes, class_names, patch_size, learning_rate=learning_rate)
        if check:
            check_images(trainer, module, Unlabelled(folder))
        data = TargetDataModule(
            Unlabelled(folder),
            batch_size=batch_size,
            num_workers=num_workers,
            patch_size=patch_size,
            patches_per_volume=patches_per_volume,
            steps_per_epoch=steps_per_epoch,
            store_dir=labels,
        )
        trainer.fit(module, data)
        refined = module.export()
        save_weights(refined, out / "refined.pt")
        write_predictions(module, folder, out, min(8, batch_size), root_device(trainer))
    return refined


class Unlabelled:
    """The images and cases of a folder, without its labels."""

    def __init__(self, folder: NiftiFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.folder[index]
        return {"image": sample["image"], "case": sample["case"]}


def _batch_size(folder: NiftiFolder, patch_size: Sequence[int] | None, batch_size: int | None) -> int:
    is_sliced = folder.preprocessing.plane is not None
    if batch_size is None:
        batch_size = 8 if is_sliced else 1 if patch_size is None else 2
    if batch_size > 1 and patch_size is None:
        firsts = [folder[folder.samples_of(case)[0]]["image"] for case in range(len(folder.cases))]
        if len(sizes := {tuple(image.shape[1:]) for image in firsts}) > 1:
            raise ValueError(
                f"Expected images of one size in a batch, but the cases have {sorted(sizes)}: pass `size` to "
                "`NiftiFolder`, or `patch_size` or batch_size=1 here."
            )
    return batch_size

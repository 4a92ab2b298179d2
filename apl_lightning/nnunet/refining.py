"""Refine the folds of a trained nnU-Net on target images."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apl_lightning._support.device import device_of
from apl_lightning._support.files import claimed, new_folder
from apl_lightning._support.packages import package
from apl_lightning._support.random_state import isolated_random_state
from apl_lightning.data import RandomPatches
from apl_lightning.folders import check_images, one_process_trainer
from apl_lightning.nnunet.network import Plan, load_network, read_plan
from apl_lightning.nnunet.results_folder import (
    copy_plans,
    find_folds,
    read_checkpoint,
    write_checkpoint,
)
from apl_lightning.nnunet.target_cases import find_cases, preprocess
from apl_lightning.nnunet.windows import Windows
from apl_lightning.pytorch_lightning import APLModule, TargetDataModule


def refine(
    results_folder: str | Path,
    images: str | Path,
    out: str | Path,
    folds: list[int | str] | int | str | None = None,
    checkpoint: str = "checkpoint_final.pth",
    *,
    max_epochs: int = 10,
    steps_per_epoch: int = 50,
    batch_size: int | None = None,
    learning_rate: float = 6e-4,
    mirroring: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    accelerator: str = "auto",
    precision: Any = "32-true",
    check: bool = True,
    trainer_options: dict[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Refine a trained nnU-Net v2 on unlabelled images, one fold after the other.

    Reads `plans.json`, `dataset.json` and the checkpoint of each fold. nnU-Net builds the network and preprocesses the
    images. APL trains on random patches of the plan's size, with labels of whole volumes (of slices, for a network in
    2D) by nnU-Net's half overlapping windows with Gaussian weights.

    Writes a results folder that `nnUNetv2_predict_from_modelfolder` and `nnUNetPredictor` load as it is. Each
    checkpoint is the one that was read, with other `network_weights`; the state of the optimiser, say, stays.

    No code in a checkpoint is executed. But plans and checkpoint name the classes of network and trainer, and nnU-Net
    imports what they name. It needs the package nnunetv2 (extra `nnunet`).

    Args:
        results_folder: The folder that nnU-Net has trained into, such as `nnUNetTrainer__nnUNetPlans__3d_fullres`.
        images: A folder of target images, named as nnU-Net wants them: `case_0000.nii.gz`, one file per channel.
        out: The refined results folder; it must be empty, or not exist. Preprocessed images and pseudo labels are kept
            in it during the run. Folds that are done stay if a later one fails: refine the other `folds` into another
            folder, and move them here. Files of your callbacks go into the folder of the fold, unless they have one of
            their own.
        folds: The folds: numbers, or `"all"`; one of them or a list (`--folds "[0,1]"` on the command line). By default
            those that have the checkpoint.
        checkpoint: The name of the checkpoints in each fold; `checkpoint_best.pth` is the other one that nnU-Net
            writes. The refined ones get the same name.
        max_epochs: Epochs; each begins with new labels until these settle (`patience` of `PseudoLabelCallback`).
        steps_per_epoch: Training batches per epoch.
        batch_size: Patches per step; by default as in the plan. nnU-Net has chosen it for mixed precision and one head:
            on a GPU that is full, pass `precision="bf16-mixed"` or fewer patches.
        learning_rate: The learning rate of the encoder (see [`APLModule`][apl_lightning.refinement.APLModule]).
        mirroring: Whether labels are means over mirrored patches, as in nnU-Net's prediction, along the axes that
            training has mirrored. With all axes, this takes 4 times as long in 2D, 8 times in 3D.
        num_workers: Worker processes that read patches.
        seed: The seed of each fold.
        accelerator: As in `Trainer`.
        precision: As in `Trainer`, such as `"bf16-mixed"`.
        check: Run [`preflight`][apl_lightning.preflight.preflight] on the network of each fold first, which warns of
            images that look turned or inverted to it, and with BatchNorm also of those resized or out of range.
        trainer_options: Further options of `Trainer`, such as `{"logger": ...}`; by default it uses one device, logs
            nothing and saves no checkpoints. Its callbacks serve all folds: with one that keeps a state, such as
            `EarlyStopping`, refine one fold at a time.

    Returns:
        What was logged last for each fold, by the fold's name: `{"fold_0": {"pseudo/estimated_gain": ...}}`, the gain
        of the network that is written.

    Raises:
        ImportError: If nnunetv2 is not installed.
        ValueError: If `out` is not empty, an input is missing or has another form, or the network is a cascade or was
            trained on regions.

    Examples:
        >>> from apl_lightning import nnunet
        >>> nnunet.refine("nnUNetTrainer__nnUNetPlans__2d", "target_images", "refined")
        Traceback (most recent call last):
        ...
        ValueError: Expected `results_folder` to be the results folder of a trained nnU-Net v2, ...
    """
    package("nnunetv2", "nnunet", "`apl_lightning.nnunet` needs nnU-Net v2")
    source = Path(results_folder).expanduser()
    names = find_folds(source, folds, checkpoint)
    target = new_folder(out)
    plan = read_plan(source, read_checkpoint(source / names[0] / checkpoint)["init_args"]["configuration"])
    cases = find_cases(Path(images).expanduser(), plan)
    device_of(accelerator)
    with isolated_random_state(cuda=True):
        _module(*load_network(source, names[0], checkpoint), plan, learning_rate)  # fails before the preprocessing
    logged = {}
    with claimed(target), tempfile.TemporaryDirectory(prefix="unfinished_", dir=target) as folder:
        dataset = preprocess(cases, plan, Path(folder) / "images")
        options = {"accelerator": accelerator, "precision": precision, "max_epochs": max_epochs}
        for name in names:
            read = read_checkpoint(source / name / checkpoint)
            network, axes = load_network(source, name, checkpoint)
            data = TargetDataModule(
                dataset,
                batch_size=batch_size or plan.configuration.batch_size,
                num_workers=num_workers,
                patch_size=plan.patch_size,
                steps_per_epoch=steps_per_epoch,
                store_dir=Path(folder) / "labels",
            )
            data.patches = RandomPatches(plan.patch_size, padding="constant")  # as nnU-Net pads small images
            with isolated_random_state(cuda=True):
                torch.manual_seed(seed)
                trainer = one_process_trainer({**options, "default_root_dir": target / name, **(trainer_options or {})})
                module = _module(network, axes if mirroring else None, plan, learning_rate)
                if check:
                    check_images(trainer, module, dataset)
                trainer.fit(module, data)
            copy_plans(source, target)
            write_checkpoint(read, module.export(), target / name / checkpoint)
            logged[name] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return logged


def _module(network: nn.Module, mirrored_axes: Sequence[int] | None, plan: Plan, learning_rate: float) -> APLModule:
    return APLModule(
        network,
        len(plan.class_names),
        plan.class_names,
        example=plan.example(network),
        learning_rate=learning_rate,
        inferer=Windows(plan.patch_size, mirrored_axes or ()),
    )

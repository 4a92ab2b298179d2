"""Tiny nnU-Nets on drawn volumes, planned, preprocessed and trained by nnU-Net's own classes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

NAME = "Dataset001_Phantoms"
SIZE = (10, 48, 40)  # as nnU-Net reads it: (Z, Y, X)
SPACING = (2.0, 1.0, 1.0)
LABELS = {"background": 0, "first": 1, "second": 2}
CASES = 5  # as many as nnU-Net has folds


def environment(root: Path) -> dict[str, str]:
    """Where nnU-Net keeps its data, and that it starts no more processes than it must; set before it is imported."""
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    return {**folders, "nnUNet_def_n_proc": "1"}


def phantom(seed: int, shifted: bool = False, size: tuple[int, ...] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An image with two organs, and its labels; `shifted` has less contrast and more noise."""
    draw = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, length) for length in size], indexing="ij"))
    labels = np.zeros(size, np.uint8)
    for label, middle in ((1, (0.0, -0.35, -0.3)), (2, (0.0, 0.35, 0.3))):
        centre = np.array(middle) + draw.uniform(-0.1, 0.1, 3)
        radius = np.array((0.7, 0.35, 0.4)) * draw.uniform(0.9, 1.2, 3)
        distance = (grid - centre[:, None, None, None]) / radius[:, None, None, None]
        labels[(distance**2).sum(axis=0) < 1] = label
    values = np.array([100.0, 220.0, 170.0] if shifted else [100.0, 300.0, 200.0])
    image = values[labels] + draw.normal(0, 24 if shifted else 12, size)
    body = (grid[1:] ** 2).sum(axis=0) < 1.2
    return np.where(body, image, 0).astype(np.float32), labels


def write(values: np.ndarray, path: Path, spacing: tuple[float, float, float] = SPACING) -> None:
    """Write an image or labels (Z, Y, X) as NIfTI."""
    from nnunetv2.imageio.simpleitk_reader_writer import sitk

    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing[::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def read(path: Path) -> np.ndarray:
    """The values (Z, Y, X) of a NIfTI file."""
    from nnunetv2.imageio.simpleitk_reader_writer import sitk

    values: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return values


def write_dataset(root: Path) -> None:
    """Write the training images, and the fingerprint that nnU-Net's extractor would compute in worker processes."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    raw, analysed = root / "raw" / NAME, []
    for case in range(CASES):
        image, labels = phantom(case)
        files = raw / "imagesTr" / f"p{case}_0000.nii.gz", raw / "labelsTr" / f"p{case}.nii.gz"
        write(image, files[0])
        write(labels, files[1])
        analysed.append(DatasetFingerprintExtractor.analyze_case([str(files[0])], str(files[1]), SimpleITKIO))
    description = {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": CASES, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))
    fingerprint = {
        "spacings": [list(map(float, case[1])) for case in analysed],
        "shapes_after_crop": [list(map(int, case[0])) for case in analysed],
        "foreground_intensity_properties_per_channel": {"0": analysed[0][3][0] | {"std": 1.0}},
        "median_relative_size_after_cropping": 1.0,
    }
    preprocessed = root / "preprocessed" / NAME
    preprocessed.mkdir(parents=True)
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint, default=float))


def plan(configuration: str, residual: bool, patch_size: list[int]) -> dict[str, Any]:
    """nnU-Net's own plans, with few features and patches smaller than the images."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        nnUNetPlannerResEncM,
    )

    planner = (nnUNetPlannerResEncM if residual else ExperimentPlanner)(1)
    planner.UNet_base_num_features = 8
    planner.UNet_max_features_2d = planner.UNet_max_features_3d = 32
    planner.UNet_blocks_per_stage_encoder = planner.UNet_blocks_per_stage_decoder = (1,) * 8
    with patch.dict(os.environ, nnUNet_n_proc_DA="1"):  # threads, here
        plans = json.loads(json.dumps(planner.plan_experiment()))
    plans["configurations"][configuration]["patch_size"] = patch_size
    return plans


def train(root: Path, plans: dict[str, Any], configuration: str, steps: dict[int | str, int]) -> Path:
    """Preprocess and train each fold for some steps with nnU-Net's own classes; returns the results folder."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw, manager = root / "raw" / NAME, PlansManager(plans)
    chosen, dataset = manager.get_configuration(configuration), json.loads((raw / "dataset.json").read_text())
    folder = root / "preprocessed" / NAME / chosen.data_identifier
    folder.mkdir()
    for case in range(CASES):
        image, labels = raw / "imagesTr" / f"p{case}_0000.nii.gz", raw / "labelsTr" / f"p{case}.nii.gz"
        preprocessor = chosen.preprocessor_class(verbose=False)
        preprocessor.run_case_save(str(folder / f"p{case}"), [str(image)], str(labels), manager, chosen, dataset)
    for fold, count in steps.items():
        torch.manual_seed(0)
        np.random.seed(0)
        given = {**plans, "continue_training": False}
        trainer = nnUNetTrainer(given, configuration, fold, dataset, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, count, 1
        with patch.dict(os.environ, nnUNet_n_proc_DA="0"):  # worker processes, here
            trainer.run_training()
    return Path(trainer.output_folder_base)

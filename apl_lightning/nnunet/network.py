"""The network of a fold, built by nnU-Net, and what belongs to it."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apl_lightning._support.modes import evaluating


class Plan(NamedTuple):
    """What nnU-Net knows of a configuration: its managers, the description of the data set, and the labels."""

    plans: Any
    configuration: Any
    dataset: dict[str, Any]
    class_names: list[str]

    @property
    def patch_size(self) -> tuple[int, ...]:
        """The spatial size of a patch, in 2D or 3D."""
        return tuple(self.configuration.patch_size)

    @property
    def channels(self) -> int:
        """The number of image files of a case."""
        return len(self.dataset.get("channel_names") or self.dataset["modality"])

    def example(self, network: nn.Module) -> Tensor:
        """Two small images that the network accepts: two pixels remain at its lowest resolution.

        Networks that take nothing but patches, such as transformers, get two patches.
        """
        strides = self.configuration.network_arch_init_kwargs.get("strides")
        if strides is not None:
            steps = [[s] * len(self.patch_size) if isinstance(s, int) else s for s in strides]
            small = self._images((2 * torch.tensor(steps).prod(dim=0)).tolist())
            with contextlib.suppress(Exception), evaluating(network), torch.no_grad():
                network(small)
                return small
        return self._images(self.patch_size)

    def _images(self, size: Sequence[int]) -> Tensor:
        return torch.randn(2, self.channels, *size, generator=torch.Generator().manual_seed(0))


def read_plan(folder: Path, configuration: str) -> Plan:
    """The plan of a configuration.

    Raises:
        ValueError: If it needs the labels of an earlier stage, or has regions that overlap.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    dataset = json.loads((folder / "dataset.json").read_text())
    chosen = plans.get_configuration(configuration)
    if chosen.previous_stage_name is not None:
        raise ValueError(
            f"Expected a configuration that sees only images, but {configuration} is a cascade, which also sees the "
            f"labels of {chosen.previous_stage_name}: refine {chosen.previous_stage_name} or 3d_fullres."
        )
    if plans.get_label_manager(dataset).has_regions:
        raise ValueError(
            f"Expected one class per pixel, but the labels in {folder / 'dataset.json'} are regions that overlap, with "
            "a sigmoid each (region-based training): refine a network that was trained on plain labels."
        )
    labels = {name: value for name, value in dataset["labels"].items() if name != "ignore"}  # it has no channel
    return Plan(plans, chosen, dataset, sorted(labels, key=lambda name: _value(labels[name])))


def _value(label: Any) -> int:
    """The value of a label, which nnU-Net also takes as text or as a list of one."""
    return int(label[0] if isinstance(label, list | tuple) else label)


def load_network(folder: Path, fold: str, checkpoint: str) -> tuple[nn.Module, Sequence[int] | None]:
    """The network of a fold without deep supervision, and the axes that nnU-Net mirrors in prediction.

    nnU-Net reads the file once more with `weights_only=False`, so `read_checkpoint` must have read it before: what
    passes that reader executes no code here either.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):  # it speaks of CUDA whatever the device
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder), (fold.removeprefix("fold_"),), checkpoint)
    network: nn.Module = getattr(predictor.network, "_orig_mod", predictor.network)  # with nnUNet_compile
    return network, predictor.allowed_mirroring_axes

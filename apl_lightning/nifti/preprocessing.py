"""From files to what a network takes: axes, spacing, size and intensities, by MONAI's transforms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apl_lightning.nifti.grid import Grid, read_grid
from apl_lightning.nifti.packages import package
from apl_lightning.nifti.reading import read_image

Plane = Literal["sagittal", "coronal", "axial"]


@dataclass(frozen=True)
class Preprocessing:
    """What [`NiftiFolder`][apl_lightning.data.NiftiFolder] does to each volume; its arguments are those of it."""

    orientation: str | None
    spacing: Sequence[float] | None
    plane: Plane | None
    size: Sequence[int] | None
    window: tuple[float, float] | None
    percentiles: tuple[float, float] | None
    normalize: bool

    def __post_init__(self) -> None:
        planes = ("sagittal", "coronal", "axial")
        if self.plane not in (None, *planes):
            raise ValueError(f"Expected `plane` to be one of {planes} or None, but got {self.plane!r}.")
        axes = sorted(self.orientation or "RAS")
        if len(axes) != 3 or any(len(set(axes) & set(pair)) != 1 for pair in ("LR", "PA", "IS")):
            raise ValueError(
                f"Expected `orientation` to be three letters, one of L or R, P or A, and I or S, as 'RAS', but got "
                f"{self.orientation!r}."
            )
        if self.spacing is not None and not (len(self.spacing) == 3 and all(0 <= mm < math.inf for mm in self.spacing)):
            raise ValueError(
                f"Expected `spacing` of the three axes in mm, 0 to keep that of an axis, but got {self.spacing}."
            )
        dimensions = 3 if self.plane is None else 2
        if self.size is not None and (len(self.size) != dimensions or min(self.size) < 1):
            raise ValueError(
                f"Expected `size` to be {dimensions} numbers of at least 1 with plane={self.plane!r}, but got "
                f"{self.size}."
            )
        if self.spacing is not None and self.size is not None:
            raise ValueError("Expected `spacing` or `size`, but got both, which interpolate twice: pass one.")
        if self.window is not None and self.percentiles is not None:
            raise ValueError("Expected `window` or `percentiles`, but got both: pass one.")
        for name, limits in (("window", self.window), ("percentiles", self.percentiles)):
            if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
                raise ValueError(f"Expected `{name}` to be a lower and an upper limit, but got {limits}.")
        if self.percentiles is not None and not (self.percentiles[0] >= 0 and self.percentiles[1] <= 100):
            raise ValueError(f"Expected `percentiles` between 0 and 100, but got {self.percentiles}.")

    def read(self, files: Sequence[Path]) -> tuple[Tensor, Grid]:
        """The image (C, *S) in these files, which hold its channels, and its grid."""
        # MONAI's `LoadImage` does the same, but warns of DICOM readers, and "repairs" some affines without a word.
        affine = torch.from_numpy(read_grid(files[0]).affine)
        data = package("monai.data").MetaTensor(torch.from_numpy(read_image(files)), affine=affine)
        data = self._resample(data)
        grid = Grid(tuple(data.shape[1:]), data.affine.numpy())
        return self._scale(data).as_tensor().contiguous(), grid

    def _resample(self, data: Any) -> Any:
        transforms = package("monai.transforms")
        if self.orientation is not None:
            data = transforms.Orientation(self.orientation, labels=None)(data)
        if self.spacing is not None:
            data = transforms.Spacing(self.spacing, mode="bilinear")(data)
        if self.size is not None:
            size = list(self.size)
            if self.plane is not None:
                size.insert(Grid(data.shape[1:], data.affine.numpy()).axis(self.plane), -1)  # as many slices
            data = transforms.Resize(size, mode="trilinear")(data)
        return data

    def _scale(self, data: Any) -> Any:
        transforms = package("monai.transforms")
        if self.window is not None:
            data = transforms.ScaleIntensityRange(*self.window, b_min=0, b_max=1, clip=True)(data)
        if self.percentiles is not None:
            limits = {"b_min": 0, "b_max": 1, "clip": True, "channel_wise": True}
            data = transforms.ScaleIntensityRangePercentiles(*self.percentiles, **limits)(data)
        return transforms.NormalizeIntensity(channel_wise=True)(data) if self.normalize else data

"""A folder of NIfTI files as a data set."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apl_lightning.nifti.cases import Case, find_cases
from apl_lightning.nifti.grid import Array, Grid, read_grid
from apl_lightning.nifti.preprocessing import Plane, Preprocessing
from apl_lightning.nifti.reading import read_labels
from apl_lightning.nifti.writing import labels_on_grid, save_labels


class Volume(NamedTuple):
    """The preprocessed image (C, *S) of a case, its label (*S) if it has one, and the grid of both."""

    image: Tensor
    label: Tensor | None
    grid: Grid


class NiftiFolder(Dataset[dict[str, Any]]):
    """The `.nii.gz` files of a folder, as volumes or as their slices in order.

    A sample is a dictionary: `image` (C, *S) in float32, `case` and, with `labels`, `label` (*S). Channels are several
    files per case, named as in nnU-Net (`<case>_0000.nii.gz`), or the fourth axis of a file. Volumes may differ in
    size. Nothing is random. Give the images what the network was trained on: by default intensities are those of the
    file. Label maps go back to the grid and the header of their file with `save_labels`.

    It needs the extra `nifti`. DICOM series must be converted first, as dcm2niix does.

    Args:
        images: The folder of the images.
        labels: A folder with a label map `<case>.nii.gz` on the grid of each image, for evaluation.
        channels: Files per case; by default found by the names.
        orientation: The body directions of the axes, as MONAI's `Orientation`: "RAS" is to the right, front and top.
            For slices, the order of the other two letters gives rows and columns: with `plane="axial"`, "PLS" has rows
            to the back and columns to the left. `None` leaves the axes as in the file.
        spacing: The size of voxels in mm along the axes, as MONAI's `Spacing`; an axis with 0 keeps its own.
        plane: Take the `"sagittal"`, `"coronal"` or `"axial"` slices; `None` takes volumes.
        size: Interpolate to this size, rows and columns of slices or three axes of volumes.
        window: Map intensities from this range to [0, 1] and clip, such as (-160, 240) HU for CT.
        percentiles: The same with the range between two percentiles of each volume and channel.
        normalize: Then subtract the mean and divide by the standard deviation of each volume and channel.
        preprocess: Called last with the image of a case: a volume (C, *S), or with a `plane` all its slices
            (B, C, H, W). It keeps the size. Networks of `apl_lightning.checkpoints.load` have it as a method.
        cache: Read all volumes once and keep them in memory; otherwise a sample reads its volume again.

    Attributes:
        cases: The cases with their files, in the order of their names.

    Raises:
        ImportError: If MONAI or nibabel is missing.
        ValueError: If the folder has no images, files do not fit each other, or an argument is out of its range.

    Examples:
        >>> import tempfile, nibabel, numpy
        >>> from pathlib import Path
        >>> from apl_lightning.data import NiftiFolder
        >>> folder = Path(tempfile.mkdtemp())
        >>> scan = nibabel.Nifti1Image(numpy.random.rand(8, 9, 5).astype("float32"), numpy.diag([1, 1, 3, 1]))
        >>> nibabel.save(scan, folder / "patient_1.nii.gz")
        >>> slices = NiftiFolder(folder, plane="axial", percentiles=(1, 99))
        >>> len(slices), slices[0]["image"].shape, slices[0]["case"]
        (5, torch.Size([1, 8, 9]), 'patient_1')
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path | None = None,
        *,
        channels: int | None = None,
        orientation: str | None = "RAS",
        spacing: tuple[float, float, float] | None = None,
        plane: Plane | None = None,
        size: Sequence[int] | None = None,
        window: tuple[float, float] | None = None,
        percentiles: tuple[float, float] | None = None,
        normalize: bool = False,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        cache: bool = True,
    ) -> None:
        self.preprocessing = Preprocessing(orientation, spacing, plane, size, window, percentiles, normalize)
        self.preprocess = preprocess
        self.cases = find_cases(images, labels, channels)
        for case in self.cases:
            _check_grids(case)
        self._cache = cache
        self._volumes: dict[int, Volume] = {}
        self._samples = [(index, place) for index in range(len(self.cases)) for place in self._places(index)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case, place = self._samples[index]
        image, label, grid = self.volume(case)
        if place is not None:
            axis = self._axis(grid)
            image = image.select(axis + 1, place)
            label = None if label is None else label.select(axis, place)
        # Copies: who changes a sample in place does not change the volume in the cache.
        sample: dict[str, Any] = {"image": _copy(image), "case": self.cases[case].name}
        return sample if label is None else {**sample, "label": _copy(label)}

    def with_preprocess(self, preprocess: Callable[[Tensor], Tensor]) -> "NiftiFolder":
        """The same folder with another `preprocess`."""
        twin = copy.copy(self)
        twin.preprocess, twin._volumes = preprocess, {}
        return twin

    def volume(self, case: int) -> Volume:
        """The volume of a case, by its place in `cases`."""
        if case not in self._volumes:
            if not self._cache:
                self._volumes.clear()  # slices of one volume follow each other
            self._volumes[case] = self._read(self.cases[case])
        return self._volumes[case]

    def samples_of(self, case: int) -> list[int]:
        """The indices of the samples of a case: that of its volume, or those of its slices in order."""
        return [index for index, (other, _) in enumerate(self._samples) if other == case]

    def labels_in_file(self, case: int, labels: Sequence[Tensor | Array]) -> Array:
        """Label maps (*S) of all samples of a case, as one volume (X, Y, Z) on the grid of its file.

        Where volumes are not resampled, each voxel keeps its label. Otherwise each class is interpolated linearly.
        """
        if not isinstance(labels, list | tuple):
            raise TypeError(f"Expected a list of label maps, one per sample, but got one {type(labels).__name__}.")
        grid, maps = self.volume(case).grid, [torch.as_tensor(each) for each in labels]
        volume = maps[0] if self.preprocessing.plane is None else torch.stack(maps, self._axis(grid))
        if tuple(volume.shape) != grid.shape:
            raise ValueError(f"Expected labels of shape {grid.shape} for case {case}, but got {tuple(volume.shape)}.")
        return labels_on_grid(volume.cpu().numpy(), grid, read_grid(self.cases[case].images[0]))

    def save_labels(self, case: int, labels: Sequence[Tensor | Array], path: str | Path) -> None:
        """Write label maps (*S) of all samples of a case, in a list, as one NIfTI file.

        The file has the affine and the header of the image, and uint8 or int16 values.

        Raises:
            FileExistsError: If `path` exists.
        """
        save_labels(self.labels_in_file(case, labels), self.cases[case].images[0], Path(path))

    def _places(self, case: int) -> Sequence[int | None]:
        if self.preprocessing.plane is None and not self._cache:
            return [None]
        grid = self.volume(case).grid
        return [None] if self.preprocessing.plane is None else range(grid.shape[self._axis(grid)])

    def _axis(self, grid: Grid) -> int:
        assert self.preprocessing.plane is not None
        return grid.axis(self.preprocessing.plane)

    def _read(self, case: Case) -> Volume:
        image, grid = self.preprocessing.read(case.images)
        image = self._prepared(image, grid)
        if case.label is None:
            return Volume(image, None, grid)
        label = torch.from_numpy(labels_on_grid(*read_labels(case.label), grid))
        return Volume(image, label.to(torch.int32), grid)

    def _prepared(self, image: Tensor, grid: Grid) -> Tensor:
        if self.preprocess is None:
            return image
        if self.preprocessing.plane is None:
            prepared = self.preprocess(image)
        else:
            axis = self._axis(grid) + 1
            prepared = self.preprocess(image.movedim(axis, 0)).movedim(0, axis)
        if prepared.shape[1:] != image.shape[1:]:
            raise ValueError(
                f"Expected `preprocess` to keep the size {tuple(image.shape[1:])}, but got "
                f"{tuple(prepared.shape[1:])}: pass `size` or `spacing`."
            )
        return prepared


def _copy(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def _check_grids(case: Case) -> None:
    """Raise a `ValueError` unless all files of a case have one grid."""
    first = read_grid(case.images[0])
    for path in (*case.images[1:], *([case.label] if case.label else [])):
        if not first.equals(grid := read_grid(path)):
            raise ValueError(
                f"Expected all files of case {case.name!r} on one grid, but {case.images[0].name} has {first} and "
                f"{path.name} has {grid}: resample one of them."
            )

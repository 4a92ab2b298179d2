"""The cases in a folder: which files belong together."""

import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

_SUFFIXES = (".nii.gz", ".nii")
_NUMBERED = re.compile(r"(.+)_(\d{4})")  # nnU-Net: liver_012_0000.nii.gz is channel 0 of case liver_012


class Case(NamedTuple):
    """A case, its image files (one per channel, or one), and the file of its reference labels if there is one."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


def find_cases(images: str | Path, labels: str | Path | None = None, channels: int | None = None) -> list[Case]:
    """The cases in a folder of NIfTI files, in the order of their names.

    With `channels` above 1, the files of a case are `<case>_0000.nii.gz`, `<case>_0001.nii.gz` and so on, as in
    nnU-Net; with 1, each file is a case. By default files are grouped if all of them are named in this way. The labels
    of a case are `<case>.nii.gz`.

    Raises:
        ValueError: If the folder has no NIfTI files, a case has two files or lacks one, or the names are ambiguous.
    """
    files = nifti_files(images)
    groups = _groups(files)
    if channels is None:
        channels = _guess(groups, len(files), images)
    if channels == 1:
        single = groups is not None and all(set(group) == {0} for group in groups.values())
        cases = [Case(name.removesuffix("_0000") if single else name, (path,)) for name, path in files.items()]
    else:
        cases = [Case(name, _channels_of(name, group, channels)) for name, group in (groups or {}).items()]
        if groups is None:
            raise ValueError(
                f"Expected {channels} files per case in {images}, named <case>_0000.nii.gz and so on, but got "
                f"{next(iter(files.values())).name}: rename them, or leave out `channels`."
            )
    return cases if labels is None else _with_labels(cases, labels)


def nifti_files(folder: str | Path) -> dict[str, Path]:
    """The `.nii.gz` and `.nii` files of a folder by their names without the ending, sorted.

    Raises:
        ValueError: If it is no folder, has no such files, or two of one name.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"Expected a folder with .nii.gz files, but got {folder}, which is no folder: check the path.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)
        if suffix is None or path.name.startswith(".") or path.is_dir():
            continue
        if not path.exists():
            raise ValueError(f"Expected a file, but {path} is a link to none: get its content first.")
        name = path.name[: -len(suffix)]
        if name in found:
            raise ValueError(
                f"Expected one file of {name!r} in {folder}, but got {found[name].name} and {path.name}: remove one."
            )
        found[name] = path
    within = next((path.name for path in sorted(folder.iterdir()) if path.is_dir() and _has_nifti(path)), None)
    if found and within is not None:
        warnings.warn(f"{folder} has files in sub-folders such as {within!r} too, which are not read.", stacklevel=3)
    if not found:
        others = sorted(path.name for path in folder.iterdir())[:3]
        cure = "convert DICOM series to NIfTI first, as dcm2niix does"
        if within is not None:
            cure = f"sub-folders such as {within!r} are not read, so pass one of them, or put their files in one folder"
        raise ValueError(
            f"Expected a folder with .nii.gz files, but {folder} has none ({', '.join(others) or 'it is empty'}): "
            f"{cure}."
        )
    return dict(sorted(found.items()))


def _has_nifti(folder: Path) -> bool:
    if not os.access(folder, os.R_OK | os.X_OK):  # such as the `lost+found` of a disk
        return False
    return any(path.name.lower().endswith(_SUFFIXES) for path in folder.iterdir())


def _groups(files: dict[str, Path]) -> dict[str, dict[int, Path]] | None:
    """Case -> channel -> file, if all names end in four digits."""
    groups: dict[str, dict[int, Path]] = {}
    for name, path in files.items():
        if (match := _NUMBERED.fullmatch(name)) is None:
            return None
        groups.setdefault(match[1], {})[int(match[2])] = path
    return groups


def _guess(groups: dict[str, dict[int, Path]] | None, count: int, folder: str | Path) -> int:
    """The number of files per case; 1 unless names look like nnU-Net's, in which each case has a channel 0."""
    first = [name for name, group in (groups or {}).items() if 0 in group]
    if groups is None or not first:
        return 1
    if others := sorted(groups.keys() - first):
        raise ValueError(
            f"Expected a file of channel 0 of each case in {folder}, but got {first[0]}_0000 and no {others[0]}_0000: "
            "add what is missing, or pass channels=1 if each file is a case."
        )
    if len(groups) == 1 and count > 1:
        raise ValueError(
            f"Expected to know whether the {count} files in {folder} are one case, but their names "
            f"({next(iter(groups))}_0000 and so on) do not say so: pass channels={count}, or channels=1 if each is a "
            "case."
        )
    return max(len(group) for group in groups.values())


def _channels_of(name: str, group: dict[int, Path], channels: int) -> tuple[Path, ...]:
    if sorted(group) != list(range(channels)):
        raise ValueError(
            f"Expected {channels} files of case {name!r}, {name}_0000 to {name}_{channels - 1:04d}, but got "
            f"{', '.join(path.name for path in group.values())}: add what is missing, or pass `channels`."
        )
    return tuple(group[channel] for channel in range(channels))


def _with_labels(cases: list[Case], labels: str | Path) -> list[Case]:
    files = nifti_files(labels)
    if missing := [case.name for case in cases if case.name not in files]:
        raise ValueError(
            f"Expected a label of each case in {labels}, but {', '.join(missing[:3])} has none among "
            f"{', '.join(path.name for path in list(files.values())[:3])}: name labels <case>.nii.gz."
        )
    return [case._replace(label=files[case.name]) for case in cases]

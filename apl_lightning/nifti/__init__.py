"""NIfTI files: a folder as a data set, and label maps back on the grid of their files."""

from apl_lightning.nifti.cases import Case, find_cases, nifti_files
from apl_lightning.nifti.folder import NiftiFolder, Volume
from apl_lightning.nifti.grid import Array, Grid, read_grid
from apl_lightning.nifti.packages import package
from apl_lightning.nifti.writing import read_labels, save_labels

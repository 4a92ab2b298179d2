"""NIfTI files: a folder as a data set, and label maps back on the grid of their files."""

from apl_lightning.nifti.cases import Case, find_cases, nifti_files
from apl_lightning.nifti.folder import NiftiFolder, Volume
from apl_lightning.nifti.grid import Array, Grid, read_grid
from apl_lightning.nifti.packages import package
from apl_lightning.nifti.preprocessing import Plane
from apl_lightning.nifti.reading import read_image, read_labels
from apl_lightning.nifti.writing import save_labels

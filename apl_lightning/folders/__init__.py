"""From a folder of NIfTI files to a folder of results, and their evaluation."""

from apl_lightning.folders.evaluate import Score, evaluate_folder, surface_scores
from apl_lightning.folders.networks import as_folder, as_network
from apl_lightning.folders.predict import predict_folder
from apl_lightning.folders.refine import refine_folder

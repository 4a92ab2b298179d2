"""From a folder of NIfTI files to a folder of results, and their evaluation."""

from apl_lightning.folders.evaluate import Score, evaluate_folder
from apl_lightning.folders.networks import as_folder_and_network, as_predictor, network_of_yaml
from apl_lightning.folders.predict import predict_folder
from apl_lightning.folders.refine import refine_folder
from apl_lightning.folders.trainer import check_images, one_process_trainer

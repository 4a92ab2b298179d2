"""One round: predict all target images, denoise the predictions, write the labels, compute their statistics."""

from apl_lightning.labels.labelling import GAIN, Labelling, predicted_at_once, target_dataset
from apl_lightning.labels.one_round import label_round
from apl_lightning.labels.selection import Selection
from apl_lightning.labels.small_components import LARGEST_COMPONENT_SHARE, SmallComponents, find_small_components
from apl_lightning.labels.statistics import warn_of_doubts

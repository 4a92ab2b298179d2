"""A network gets a second classifier on its shared encoder; the plain network can be exported again."""

from apl_lightning.heads.add import add_dual_heads
from apl_lightning.heads.copies import clean_copy
from apl_lightning.heads.find_classifier import HeadNotFoundError, convolution_dimensions, example_input
from apl_lightning.heads.main_output import select_main_output
from apl_lightning.heads.model import DualHeadModel, Inferer
from apl_lightning.heads.outputs import are_probabilities, logit_maps, shapes_of, sum_to_one, tensors_in
from apl_lightning.heads.second_head import Logits
from apl_lightning.heads.warmup import warm_up_second_head

"""The networks of the seven systems, with the parameter names of the original projects."""

from apl_lightning.checkpoints.networks.deeplab import DeepLabV2, DeepLabVGG
from apl_lightning.checkpoints.networks.drn import DRN
from apl_lightning.checkpoints.networks.fcn8s import FCN8s
from apl_lightning.checkpoints.networks.raw_image import RawImageNetwork
from apl_lightning.checkpoints.networks.resnet_generator import ResnetGenerator
from apl_lightning.checkpoints.networks.sifa import ENCODER_BLOCKS, SIFA
from apl_lightning.checkpoints.networks.sifa_generator import SIFAGenerator
from apl_lightning.checkpoints.networks.translated import Translated
from apl_lightning.checkpoints.networks.unused import keep_unused

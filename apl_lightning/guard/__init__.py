"""Estimate without labels whether refinement gains; end with the network that does."""

from apl_lightning.guard.gain import estimate_gain, second_opinion
from apl_lightning.guard.guard import IN_DOUBT, LOSS_WEIGHT, RISE, Guard, GuardMode, careful_gain
from apl_lightning.guard.pixel_sample import Classes, PixelSample, joined
from apl_lightning.guard.snapshot import Snapshot

"""Scores without labels show whether refinement does harm; the network of the last healthy round can be restored."""

from apl_lightning.guard.guard import Guard, GuardMode
from apl_lightning.guard.snapshot import Snapshot
from apl_lightning.guard.unsupervised_scores import UnsupervisedScores

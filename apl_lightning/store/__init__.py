"""Pseudo labels and weights live on disk, round by round, and every process sees the same round."""

from apl_lightning.store.round_files import RoundWriter
from apl_lightning.store.round_reader import PseudoLabel, RoundReader
from apl_lightning.store.store import PseudoLabelStore
from apl_lightning.store.sync_nodes import complete_round

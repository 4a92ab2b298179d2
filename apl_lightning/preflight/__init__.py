"""Ask a network, without labels, whether images are turned, inverted, resized or out of range for it."""

from apl_lightning.preflight.decision import MARGINS, best_of, gain
from apl_lightning.preflight.picture import Shown
from apl_lightning.preflight.report import PreflightReport, Trial
from apl_lightning.preflight.run import preflight
from apl_lightning.preflight.score import Likeness, RunningStatistics, Score, sureness
from apl_lightning.preflight.views import View

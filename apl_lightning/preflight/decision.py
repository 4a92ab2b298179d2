"""Whether a view suits a network clearly better than the images as they are."""

import math
from collections.abc import Sequence
from statistics import mean

from apl_lightning.preflight.report import Trial
from apl_lightning.preflight.score import Score
from apl_lightning.preflight.views import Kind, View

# The least gain of a finding in one part of the images, by kind, see docs/preflight.md. Ranges have more, because
# another contrast changes their gain by about 1 and a wrong range by 3.
MARGINS: dict[Kind, float] = {"orientation": 0.6, "inverted": 0.85, "channels": 0.85, "size": 0.7, "range": 2.0}
_LIKE = 3.0  # the likeness of features that the network knows
_DOUBT = 2.0  # how much the margin of a single patient grows per unit of likeness below it
_AGREE = 0.75  # the share of the parts that must gain


def best_of(trials: Sequence[Trial], cases: int) -> Trial | None:
    """The trial with the largest gain, among those with clear gains, in images of some cases."""
    clear = [trial for trial in trials if is_clear(trial.gains, MARGINS[trial.view.kind], cases, trial.likeness)]
    return max(clear, key=lambda trial: trial.gain, default=None)


def is_clear(gains: Sequence[float], margin: float, cases: int, likeness: float | None) -> bool:
    """Whether the gains in parts of the images are above a margin, and most of them above 0.

    The mean over n patients has the error of one of them divided by the square root of n, and so has the margin. More
    slices of one patient err alike. A single patient may be unlike all others: the margin is larger if, under the view
    too, the features are unlike those of training.
    """
    independent = min(len(gains), cases)
    if independent == 1 and likeness is not None:
        margin *= 1 + _DOUBT * max(0.0, _LIKE - likeness)
    return mean(gains) > margin / math.sqrt(independent) and sum(gain > 0 for gain in gains) / len(gains) >= _AGREE


def gain(view: View, before: Score, after: Score) -> float:
    """How much better a view suits a network.

    It is the rise of sureness and of likeness: in the later layers, if the view turns images or blurs them. Intensities
    out of range make a network sure of anything, so of ranges only likeness counts.
    """
    surer = after.sureness - before.sureness
    was, becomes = (likeness_under(view, score) for score in (before, after))
    if was is None or becomes is None:
        return surer
    return becomes - was if view.kind == "range" else surer + becomes - was


def likeness_under(view: View, score: Score) -> float | None:
    """The likeness that judges a view."""
    if score.likeness is None:
        return None
    return score.likeness.late if view.kind == "orientation" or view.enlarges > 1 else score.likeness.all

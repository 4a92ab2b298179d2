"""Choose the network to end with, without target labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, get_args

GuardMode = Literal["restore", "warn", "off"]

RISE = 0.005  # half a point of Dice: smaller rises of an estimated gain are within its error
IN_DOUBT = 0.01  # smaller differences, either way, decide nothing
LOSS_WEIGHT = 4.0  # of a class; chosen on the benchmark, see docs/guard.md


def careful_gain(gains: Sequence[float], loss_weight: float = LOSS_WEIGHT) -> float:
    r"""The mean estimated gain of the foreground classes, in which losses count several times.

    $$\frac{1}{K} \sum_{c=1}^{K} \left(\max(g_c, 0) + w \min(g_c, 0)\right)$$

    So an organ that fades does not hide behind others that grow.

    Args:
        gains: $g_c$ of [`estimate_gain`][apl_lightning.guard.estimate_gain].
        loss_weight: w.

    Examples:
        >>> from apl_lightning.guard import careful_gain
        >>> round(careful_gain([0.06, 0.04, -0.02]), 4)  # (0.06 + 0.04 - 4 * 0.02) / 3
        0.0067
    """
    return fmean(loss_weight * gain if gain < 0 else gain for gain in gains) if gains else 0.0


@dataclass(eq=False)
class Guard:
    """Compares each network with the one that came in, by its estimated gain of Dice.

    The gain is that of [`estimate_gain`][apl_lightning.guard.estimate_gain], averaged over the foreground classes. The
    candidates are the network as it came in, with a gain of 0, and the one that makes the labels of each round. That of
    round 0 differs from the first one by its BatchNorm statistics. A later candidate is best only if its
    [`careful_gain`][apl_lightning.guard.careful_gain] is higher by half a point: smaller rises are within the error of
    the estimate, and an earlier network has drifted less.

    Args:
        mode: `"restore"` ends the run with the best candidate if the network of the last epoch is harmed; `"warn"` only
            says so; `"off"` does nothing.
        kept: The network of the last epoch is harmed if its estimated gain is negative, or below this share of that of
            the best candidate and more than a point of Dice below it.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from apl_lightning.guard import Guard
        >>> guard = Guard("restore")
        >>> guard.is_best(0.12, careful=0.11), guard.is_best(0.13, careful=0.10)
        (True, False)
        >>> guard.is_harmed(0.11), guard.is_harmed(0.03)
        (False, True)
    """

    mode: GuardMode
    kept: float = 0.75
    best: float = field(default=0.0, init=False)
    best_careful: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(GuardMode):
            raise ValueError(f"Expected the guard to be one of {get_args(GuardMode)}, but got {self.mode!r}.")
        if not 0 <= self.kept <= 1:
            raise ValueError(f"Expected `kept` in [0, 1], but got {self.kept}.")

    def reset(self) -> None:
        """Start without candidates."""
        self.best = self.best_careful = 0.0

    def is_best(self, gain: float, careful: float) -> bool:
        """Whether the careful gain of a candidate is clearly above those of all before; remembers both gains."""
        if not careful > self.best_careful + RISE:
            return False
        self.best, self.best_careful = gain, careful
        return True

    def is_harmed(self, gain: float) -> bool:
        """Whether the network of the last epoch is so much worse than the best candidate that it must not stay."""
        return not gain >= max(0.0, min(self.kept * self.best, self.best - IN_DOUBT))

"""Detect without target labels that a network gets worse."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

GuardMode = Literal["warn", "restore", "off"]

_RATIO = "pseudo/class_ratio/"


@dataclass(eq=False)
class Guard:
    """Compares the scores of a network with those of the first round, before any training.

    A class that takes over others changes the class ratios. If all classes fade a little, information maximisation
    (diversity minus uncertainty) falls. A slow deterioration changes neither, so a healthy network must also show a
    gain: its predictions form denser clusters. The scores are those of
    [`UnsupervisedScores`][apl_lightning.guard.UnsupervisedScores].

    Args:
        mode: `"warn"` about complaints; `"restore"` also ends the run with the last healthy round, without complaint
            or doubt; `"off"` does nothing.
        drift: The largest factor by which a class may grow or shrink.
        fade: The largest relative fall of information maximisation.
        agreement: The largest fall of the agreement of the heads.
        density: Minimum rise of soft neighbourhood density that counts as a gain.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from apl_lightning.guard import Guard
        >>> guard = Guard("warn")
        >>> first = {"pseudo/class_ratio/spleen": 0.020, "pseudo/agreement": 0.99, "pseudo/im": 0.30, "pseudo/snd": 5.3}
        >>> guard.start(first)
        >>> guard.complaints(first)
        []
        >>> guard.complaints(first | {"pseudo/class_ratio/spleen": 0.004})
        ["'spleen' is 0.40 % of all pixels, 0.20 times the 2.00 % of the first round"]
        >>> guard.complaints(first | {"pseudo/im": 0.27})
        ['information maximisation is 0.270, 0.90 times the 0.300 of the first round']
        >>> guard.doubts(first | {"pseudo/snd": 5.31})
        ['soft neighbourhood density is 5.310, and was 5.300 in the first round: no sign of a gain']
    """

    mode: GuardMode
    drift: float = 1.6
    fade: float = 0.03
    agreement: float = 0.05
    density: float = 0.02
    first: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(GuardMode):
            raise ValueError(f"Expected `guard` to be one of {get_args(GuardMode)}, but got {self.mode!r}.")
        if not (self.drift > 1 and 0 < self.fade < 1 and self.agreement > 0):
            raise ValueError(f"Expected `drift` > 1, `fade` between 0 and 1 and `agreement` > 0, but got {self}.")

    def start(self, scores: Mapping[str, float]) -> None:
        """Remember the scores of the first round."""
        self.first = dict(scores)

    def complaints(self, scores: Mapping[str, float]) -> list[str]:
        """What is worse than in the first round, each with its value."""
        if self.mode == "off":
            return []
        found = []
        for name in (name for name in self.first if name.startswith(_RATIO)):
            before, now = self.first[name], scores[name]
            if before > 0 and not 1 / self.drift <= now / before <= self.drift:
                found.append(
                    f"{name.removeprefix(_RATIO)!r} is {now:.2%} of all pixels, {now / before:.2f} times the "
                    f"{before:.2%} of the first round".replace("%", " %")
                )
        before, now = self.first["pseudo/im"], scores["pseudo/im"]
        if now < (1 - self.fade) * before:
            found.append(
                f"information maximisation is {now:.3f}, {now / before:.2f} times the {before:.3f} of the first round"
            )
        before, now = self.first["pseudo/agreement"], scores["pseudo/agreement"]
        if before - now > self.agreement:
            found.append(f"the heads agree on {now:.3f} of all pixels, and on {before:.3f} in the first round")
        return found

    def doubts(self, scores: Mapping[str, float]) -> list[str]:
        """Why a later round without complaints may still not be a gain; empty for the first round itself."""
        before, now = self.first["pseudo/snd"], scores["pseudo/snd"]
        if now >= before + self.density or scores == self.first:
            return []
        return [f"soft neighbourhood density is {now:.3f}, and was {before:.3f} in the first round: no sign of a gain"]

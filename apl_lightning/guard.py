"""Do no harm: notice without any target label that a network gets worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

GuardMode = Literal["warn", "restore", "off"]

_RATIO = "pseudo/class_ratio/"


class Guard:
    """Compares each round with the first one, whose labels are those of the network that came in.

    A class that spreads over others changes the class ratios; classes that fade away, all of them a little, lower the
    information maximisation (diversity minus uncertainty). What gets a little worse without either cannot be seen; so
    a network that shall stay must also show that it gained: its predictions cluster more densely.

    Args:
        mode: `"warn"` about a complaint; `"restore"` the last round without complaint or doubt at the end, too;
            `"off"`.
        drift: A class may grow or shrink by this factor.
        fade: By this part may the information maximisation fall.
        agreement: By so much may the agreement of the heads fall.
        density: By so much must the soft neighbourhood density rise, or a gain is in doubt.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from apl_lightning.guard import Guard
        >>> guard = Guard("warn")
        >>> first = {"pseudo/class_ratio/spleen": 0.020, "pseudo/agreement": 0.99, "pseudo/im": 0.30, "pseudo/snd": 5.3}
        >>> guard.complaints(first)
        []
        >>> guard.complaints(first | {"pseudo/class_ratio/spleen": 0.004})
        ["'spleen' is 0.40 % of all pixels, 0.20 times the 2.00 % of the first round"]
        >>> guard.complaints(first | {"pseudo/im": 0.27})
        ['information maximisation is 0.270, 0.90 times the 0.300 of the first round']
        >>> guard.doubts({"pseudo/snd": 5.31})
        ['soft neighbourhood density is 5.310, and was 5.300 in the first round: no sign of a gain']
    """

    def __init__(
        self,
        mode: GuardMode,
        drift: float = 1.6,
        fade: float = 0.03,
        agreement: float = 0.05,
        density: float = 0.02,
    ) -> None:
        if mode not in get_args(GuardMode):
            raise ValueError(f"Expected `guard` to be one of {get_args(GuardMode)}, but got {mode!r}.")
        if not (drift > 1 and 0 < fade < 1 and agreement > 0):
            raise ValueError(
                "Expected `drift` > 1, `fade` between 0 and 1 and `agreement` > 0, but got "
                f"{drift}, {fade} and {agreement}."
            )
        self.mode = mode
        self.drift = drift
        self.fade = fade
        self.agreement = agreement
        self.density = density
        self.first: dict[str, float] = {}

    def reset(self) -> None:
        """A new run."""
        self.first = {}

    def complaints(self, figures: Mapping[str, float]) -> list[str]:
        """What has become worse since the first round, each with its figure; the first round is remembered."""
        if self.mode == "off":
            return []
        self.first = self.first or dict(figures)
        found = []
        for name in (name for name in self.first if name.startswith(_RATIO)):
            before, now = self.first[name], figures[name]
            if before > 0 and not 1 / self.drift <= now / before <= self.drift:
                found.append(
                    f"{name.removeprefix(_RATIO)!r} is {now:.2%} of all pixels, {now / before:.2f} times the "
                    f"{before:.2%} of the first round".replace("%", " %")
                )
        before, now = self.first["pseudo/im"], figures["pseudo/im"]
        if now < (1 - self.fade) * before:
            found.append(
                f"information maximisation is {now:.3f}, {now / before:.2f} times the {before:.3f} of the first round"
            )
        before, now = self.first["pseudo/agreement"], figures["pseudo/agreement"]
        if before - now > self.agreement:
            found.append(f"the heads agree on {now:.3f} of all pixels, and on {before:.3f} in the first round")
        return found

    def doubts(self, figures: Mapping[str, float]) -> list[str]:
        """Why a later round without complaints might still be no better than the first, with its figure."""
        before, now = self.first["pseudo/snd"], figures["pseudo/snd"]
        if now >= before + self.density or figures == self.first:
            return []
        return [f"soft neighbourhood density is {now:.3f}, and was {before:.3f} in the first round: no sign of a gain"]

    def state_dict(self) -> dict[str, float]:
        """The figures of the first round, for a checkpoint."""
        return self.first

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.first = state_dict

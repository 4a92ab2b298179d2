"""Do no harm: notice a collapse without any target label, and keep the best round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

GuardMode = Literal["warn", "restore", "off"]

_RATIO = "pseudo/class_ratio/"


class Guard:
    """Compares each round with the first one, whose labels are those of the network that came in.

    Args:
        mode: `"warn"` about a collapse; `"restore"` the best round at the end, too; `"off"`.
        drift: A class that has grown or shrunk by more than this factor since the first round is called collapsed.
        agreement: So far may the agreement of the heads fall.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> from apl_lightning.guard import Guard
        >>> guard = Guard("warn")
        >>> first = {"pseudo/class_ratio/spleen": 0.020, "pseudo/agreement": 0.99}
        >>> guard.complaints(first)
        []
        >>> guard.complaints({"pseudo/class_ratio/spleen": 0.004, "pseudo/agreement": 0.99})
        ["'spleen' is 0.40 % of all pixels, 0.20 times the 2.00 % of the first round"]
    """

    def __init__(self, mode: GuardMode, drift: float = 2.0, agreement: float = 0.05) -> None:
        if mode not in get_args(GuardMode):
            raise ValueError(f"Expected `guard` to be one of {get_args(GuardMode)}, but got {mode!r}.")
        if not (drift > 1 and agreement > 0):
            raise ValueError(f"Expected `drift` > 1 and `agreement` > 0, but got {drift} and {agreement}.")
        self.mode = mode
        self.drift = drift
        self.agreement = agreement
        self.first: dict[str, float] = {}

    def reset(self) -> None:
        """A new run."""
        self.first = {}

    def complaints(self, statistics: Mapping[str, float]) -> list[str]:
        """What has collapsed since the first round, each with its figure; the first round is remembered."""
        if self.mode == "off":
            return []
        if not self.first:
            self.first = dict(statistics)
        found = []
        for name, before in self.first.items():
            now = statistics[name]
            if name.startswith(_RATIO) and before > 0 and not 1 / self.drift <= now / before <= self.drift:
                found.append(
                    f"{name.removeprefix(_RATIO)!r} is {now:.2%} of all pixels, {now / before:.2f} times the "
                    f"{before:.2%} of the first round".replace("%", " %")
                )
        if self.first["pseudo/agreement"] - statistics["pseudo/agreement"] > self.agreement:
            found.append(
                f"the heads agree on {statistics['pseudo/agreement']:.3f} of all pixels, and on "
                f"{self.first['pseudo/agreement']:.3f} in the first round"
            )
        return found

    def score(self, statistics: Mapping[str, float]) -> float:
        """The label-free criterion by which the best round is chosen: the higher, the better."""
        return statistics["pseudo/snd"]

    def state_dict(self) -> dict[str, float]:
        """The figures of the first round, for a checkpoint."""
        return self.first

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.first = state_dict

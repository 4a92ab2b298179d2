"""What preflight found, as text, as a warning and as a picture."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from apl_lightning.preflight.picture import Shown, draw
from apl_lightning.preflight.views import Kind, View

_WORDS: dict[Kind, str] = {
    "orientation": "turned",
    "inverted": "inverted",
    "range": "rescaled",
    "size": "resized",
    "channels": "other orders of channels",
}


class Trial(NamedTuple):
    """How much better than the images as they are a view suits the network, in each part of the images.

    Attributes:
        view: What was tried.
        gains: See [`gain`][apl_lightning.preflight.gain].
        surer: The rise of sureness alone.
        likeness: How like the features under the view are to those of training, see
            [`RunningStatistics`][apl_lightning.preflight.RunningStatistics]; `None` if the network does not say.
    """

    view: View
    gains: list[float]
    surer: list[float]
    likeness: float | None

    @property
    def gain(self) -> float:
        """The mean over the parts."""
        return sum(self.gains) / len(self.gains)


@dataclass(frozen=True, eq=False)
class PreflightReport:
    """What a network says of images; `str(report)` is the text.

    Attributes:
        found: The view that the network would rather see; `None` if there is none that it clearly prefers.
        trials: All views that were tried.
        skipped: The views that could not be tried, and why.
        as_they_are: Some images with predictions.
        as_preferred: The same under the view that was found; empty without one.
    """

    found: Trial | None
    trials: Sequence[Trial]
    skipped: Sequence[str]
    as_they_are: Sequence[Shown]
    as_preferred: Sequence[Shown]

    def __str__(self) -> str:
        not_tried = f" Not tried: {'; '.join(self.skipped)}." if self.skipped else ""
        if self.found is None:
            kinds = ", ".join(dict.fromkeys(_WORDS[trial.view.kind] for trial in self.trials))
            return (
                f"Nothing found: none of {len(self.trials)} views of your images ({kinds}) suits this network clearly "
                f"better than the images as they are.{not_tried}"
            )
        view, gains = self.found.view, self.found.gains
        return (
            f"Your images look {view.looks} to this network: changed, they suit it clearly better (gain "
            f"{self.found.gain:.1f}, in {sum(gain > 0 for gain in gains)} of {len(gains)} parts of the images). If the "
            f"picture says so too, change the data set: {view.cure}. Then run preflight again.{not_tried}"
        )

    def warn(self) -> None:
        """Warn if something was found."""
        if self.found is not None:
            warnings.warn(str(self), stacklevel=2)

    def picture(self, path: str | Path) -> Path:
        """Write a picture: images as they are and as the network would like them, with what it predicts.

        Raises:
            FileExistsError: If there is such a file already.
            ImportError: If matplotlib is missing.
        """
        rows = {"Your images": self.as_they_are}
        if self.as_preferred:
            rows["As the network would like them"] = self.as_preferred
        return draw(rows, Path(path))

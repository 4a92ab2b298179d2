"""Choose without labels between the network as it came in and those of the rounds."""

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apl_lightning._support.distributed import gather, once_per_node, rank, share_state
from apl_lightning._support.lightning import rank_zero_info
from apl_lightning._support.modes import not_finite
from apl_lightning.guard import RISE, Classes, Guard, PixelSample, Snapshot, joined
from apl_lightning.labels.labelling import CAREFUL_GAIN, GAIN, Labelling


class Selection:
    """Compares each candidate with the network as it came in, and keeps the best one on disk.

    Args:
        guard: Decides which candidate is best, and whether the network of the last epoch may stay.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.reset()

    def reset(self) -> None:
        """Start without candidates."""
        self.guard.reset()
        self.snapshot = Snapshot()
        self.has_restored = False  # whether the run has ended with an earlier network
        self.first: Classes = {}  # what the network predicted as it came in
        self.risen_in = 0  # the round whose estimated gain has last risen
        self._highest = 0.0  # its estimated gain
        self._best_gains: dict[str, float] = {}  # of the best candidate; empty for the network as it came in
        self.sample: PixelSample | None = None

    def sample_of(self, length: int) -> PixelSample:
        """The sampled pixels of the run's images, made when it is first called."""
        if self.sample is None:
            self.sample = PixelSample(length)
        return self.sample

    def begin(self, labelling: Labelling, seed: int) -> dict[str, float]:
        """Keep the network as it came in, let the module prepare itself, and choose its BatchNorm statistics."""
        if labelling.sample is not None:
            self.first = joined(labelling.look(seed))
        if self.guard.mode == "restore":
            self._keep(-1, labelling)
        labelling.prepare()
        must_choose = getattr(labelling.module, "awaits_batch_norm", False)
        chosen = self._choose_batch_norm(labelling, seed) if must_choose else {}
        labelling.warm_up()
        return chosen

    def _choose_batch_norm(self, labelling: Labelling, seed: int) -> dict[str, float]:
        gain = labelling.gains(self.first, labelling.look(seed))[GAIN]
        chosen = labelling.module.choose_batch_norm(gain)  # type: ignore[operator]
        rank_zero_info(
            f"batch_norm='auto': the statistics are {chosen}. By estimate, re-estimation changes the Dice by "
            f"{100 * gain:+.1f} points."
        )
        return {"pseudo/batch_norm_gain": gain}

    def judge(self, round: int, classes: Classes, labelling: Labelling) -> dict[str, float]:
        """Keep the network of a round if it is the best so far; returns its estimated gains, for the log."""
        if not self.first:  # a run that began without a guard
            self.risen_in = round
            return {}
        gains = labelling.gains(self.first, classes)
        if self.guard.mode == "warn" and self.guard.is_harmed(gains[GAIN]) and round > 0:
            self._warn(f"In round {round}", gains[GAIN], "Look at the pseudo labels, or pass guard='restore'")
        if gains[GAIN] > self._highest + RISE:
            self.risen_in, self._highest = round, gains[GAIN]
        if self.guard.is_best(gains[GAIN], gains[CAREFUL_GAIN]):
            self._best_gains = gains
            if self.guard.mode == "restore":
                self._keep(round, labelling)
        return gains

    def end(self, labelling: Labelling, seed: int) -> dict[str, float]:
        """Return to the best candidate if the network of the last epoch is harmed, or only say so.

        Returns the estimated gains of the network that the run ends with, for the log.
        """
        if not self.first:
            return {}
        module, local_rank = labelling.module, labelling.local_rank
        share_state(module)
        gains = self._last_gains(labelling, seed)
        if not self.guard.is_harmed(gains[GAIN]):
            return gains
        if self.guard.mode == "warn":
            self._warn("After the last epoch", gains[GAIN], "Look at the pseudo labels, or pass guard='restore'")
            return gains
        folder = labelling.dataset.store.directory
        exists = self.has_restored = self._has_snapshot(folder, local_rank)
        if exists:
            once_per_node(local_rank, "Restoring the best network", partial(self.snapshot.restore, module, folder))
            share_state(module)
        self._warn("After the last epoch", gains[GAIN], self._outcome(exists, folder))
        return (self._best_gains or dict.fromkeys(gains, 0.0)) if exists else gains

    def find_snapshot(self, folder: Path, local_rank: int) -> None:
        """Let a resumed run without the file of its best candidate keep later ones."""
        if self.guard.mode != "restore" or not self.first or self._has_snapshot(folder, local_rank):
            return
        if rank() == 0:
            warnings.warn(
                f"The best network so far is not in {folder}: its file is missing, damaged or that of another run. If "
                "the run is harmed, it ends with the best network from here on.",
                stacklevel=2,
            )
        self.guard.reset()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know."""
        indices = sorted(self.first)
        classes = [self.first[index] for index in indices]
        return {
            "best": self.guard.best,
            "best_careful": self.guard.best_careful,
            "risen_in": self.risen_in,
            "highest": self._highest,
            "best_gains": self._best_gains,
            "snapshot": self.snapshot.state_dict(),
            "indices": torch.tensor(indices, dtype=torch.long),
            "sizes": torch.tensor([len(found) for found in classes], dtype=torch.long),
            "classes": torch.cat(classes) if classes else torch.empty(0, dtype=torch.short),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        # A run that only warned has kept no file to restore.
        kept = self.guard.mode == "warn" or state_dict["snapshot"]["round"] >= 0
        self.guard.reset()
        if kept:
            self.guard.best, self.guard.best_careful = state_dict["best"], state_dict["best_careful"]
        self.risen_in, self._highest = state_dict["risen_in"], state_dict["highest"]
        self._best_gains = state_dict["best_gains"] if kept else {}
        self.snapshot.load_state_dict(state_dict["snapshot"])
        parts = state_dict["classes"].cpu().split(state_dict["sizes"].tolist())
        self.first = dict(zip(state_dict["indices"].tolist(), parts, strict=True))

    def _last_gains(self, labelling: Labelling, seed: int) -> dict[str, float]:
        """The estimated gains of the module; NaN if its weights or its predictions are not finite."""
        unknown = {GAIN: math.nan, CAREFUL_GAIN: math.nan}
        if not_finite(labelling.module.state_dict()):
            return unknown
        try:
            return labelling.gains(self.first, labelling.look(seed))
        except (ValueError, RuntimeError) as error:  # a `RuntimeError` if a rank has met the `ValueError`
            if "finite predictions" in str(error):
                return unknown
            raise

    def _has_snapshot(self, folder: Path, local_rank: int) -> bool:
        """Whether the file of the best candidate is on all nodes; all ranks call it."""
        return all(gather(local_rank != 0 or self.snapshot.is_in(folder)))

    def _keep(self, round: int, labelling: Labelling) -> None:
        self.snapshot.round = round
        write = partial(self.snapshot.write, labelling.module, labelling.dataset.store.directory)
        once_per_node(labelling.local_rank, "Keeping a network", write)

    def _outcome(self, exists: bool, folder: Path) -> str:
        round = self.snapshot.round
        best = "as it came in" if round < 0 else f"of round {round}"
        if exists:
            return f"guard='restore': the network {best} is restored"
        return f"guard='restore': the network {best} was better, but its file in {folder} is missing or damaged"

    def _warn(self, when: str, gain: float, cure: str) -> None:
        if rank() > 0:
            return
        found = (
            "the weights or the predictions are not finite"
            if math.isnan(gain)
            else f"the Dice is {100 * gain:+.1f} points from that of the network as it came in by estimate, and that "
            f"of the best candidate {100 * self.guard.best:+.1f} points"
        )
        warnings.warn(f"{when}, {found}. {cure}.", stacklevel=2)

"""When pseudo labels are made, by whom, and what is told about them."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from apl_lightning import ranks
from apl_lightning._lightning import Callback, LightningModule, Trainer
from apl_lightning.denoisers import APL, Denoiser
from apl_lightning.dual import Inferer
from apl_lightning.exchange import complete
from apl_lightning.guard import Guard, GuardMode
from apl_lightning.healthy_round import HealthyRound
from apl_lightning.labelling import Labelling, target_dataset
from apl_lightning.preemption import stop_at_next_batch
from apl_lightning.randomness import derived_seed, run_seed
from apl_lightning.store import PseudoLabelStore
from apl_lightning.strategies import refuse_parted


class PseudoLabelCallback(Callback):
    """Makes the pseudo labels of all target images anew, each epoch, before the first batch of it is fetched.

    Every rank labels its share with the module in evaluation mode and the trainer's precision and writes it to the
    store; then all ranks see the new round at once. Before the first round the module may prepare itself on the
    target images (BatchNorm statistics, a fresh second head). A resumed run goes on with the labels of the round that
    its checkpoint belongs to.

    Before each batch torch is seeded from the run's seed, the epoch, the batch and the rank, so that a resumed run
    draws (dropout, say) what an uninterrupted one would.

    Logged once a round: `pseudo/confidence` (mean weight that the denoiser gives), `pseudo/apart` (part of the
    foreground's that `ignore_small_components` has taken), `pseudo/agreement` (part of the pixels where both heads
    say the same), `pseudo/changed` (part of the labels that differ from the round before),
    `pseudo/class_ratio/<class>`, `pseudo/im` and `pseudo/snd` (two label-free figures of quality, see
    [`LabelFreeValidators`][apl_lightning.validators.LabelFreeValidators]) and, where the data set holds reference
    labels, `pseudo/dice`, which nothing but the log reads.

    Args:
        denoiser: Turns predictions into labels and weights, `APL()` by default; another method of
            [`denoisers`][apl_lightning.denoisers], or any callable of the probabilities of both heads.
        every_n_epochs: New labels before each n-th epoch.
        inferer: Predicts through this callable of images and network, as MONAI's `SlidingWindowInferer`.
        batch_size: Images that a rank predicts at once; 16 slices (on a CPU as many as have 2^17 pixels) or 1 volume by
            default. It is not that of training, so that the labels do not depend on the number of processes.
        guard: `"warn"` when a class, the predictions or the agreement of the heads collapse (see
            [`Guard`][apl_lightning.guard.Guard]); with `"restore"` the run also ends with the network of the last round
            that has not and shows a gain; `"off"`.
        ignore_small_components: Give weight 0 to what lies apart from the largest connected component of its class in
            a patient, if the class is nearly one piece and the patients (`case`) are known: see
            [`small_components`][apl_lightning.components.small_components], also for what the order of slices must be.
            By default only with `APL`: other methods stay as they were published.

    Raises:
        ValueError: If `every_n_epochs` or `batch_size` is below 1, or `guard` is unknown.

    Examples:
        >>> from apl_lightning import PseudoLabelCallback
        >>> from apl_lightning.denoisers import APL
        >>> callback = PseudoLabelCallback(denoiser=APL(temperature=2.0), every_n_epochs=2)
        >>> [epoch for epoch in range(5) if callback.should_update(epoch)]
        [0, 2, 4]
    """

    def __init__(
        self,
        denoiser: Denoiser | None = None,
        every_n_epochs: int = 1,
        inferer: Inferer | None = None,
        batch_size: int | None = None,
        guard: GuardMode = "warn",
        ignore_small_components: bool | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
        self.denoiser: Denoiser = APL() if denoiser is None else denoiser
        self.every_n_epochs = every_n_epochs
        self.inferer = inferer
        self.batch_size = batch_size
        ours = isinstance(self.denoiser, APL)
        self.ignore_small_components = ours if ignore_small_components is None else ignore_small_components
        self.guard = Guard(guard)
        self.healthy = HealthyRound()
        self.round = -1
        self.statistics: dict[str, float] = {}
        self._epoch = -1  # the epoch that `round` was made for
        self._saved_round = -1  # the round that the newest checkpoint needs
        self._seed = 0

    def should_update(self, epoch: int) -> bool:
        """Whether new labels are due before this epoch."""
        return epoch % self.every_n_epochs == 0

    def update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make, write and show the labels of a new round."""
        labelling = self._labelling(trainer, pl_module)
        store, round = labelling.dataset.store, self.round + 1
        if self.round < 0:
            with ranks.together("Preparing the network on the target images"):
                labelling.prepare()
        ranks.share_state(pl_module)
        with ranks.together("Making room for pseudo labels"):
            if trainer.local_rank == 0:
                store.start(round)
        self.statistics = labelling.label(self.denoiser, round, derived_seed(self._seed, round))
        complete(store.folder(round), responsible=trainer.local_rank == 0)
        with ranks.together("Joining the new pseudo labels"):
            if trainer.local_rank == 0:
                store.join(round)
        if self.ignore_small_components:
            self.statistics |= labelling.ignore_small_components(round)
        with ranks.together("Showing the new pseudo labels"):
            if trainer.local_rank == 0:
                store.show(round)
                store.prune(keep={round, self._saved_round})
        self.round, self._epoch = round, trainer.current_epoch
        self._watch(trainer, pl_module, store)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """What a round would log about the module as it is now, without making one; call it on all ranks."""
        return self._labelling(trainer, pl_module).measure()

    def figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The statistics of the current round, measured anew where the denoiser predicts in its own way.

        So they compare with those of the network after the last epoch, which makes no labels.
        """
        return self.measure(trainer, pl_module) if hasattr(self.denoiser, "predict") else self.statistics

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit begins with round 0, unless a checkpoint says otherwise.

        Raises:
            ValueError: If the strategy parts the network: then no process can label images by itself.
        """
        refuse_parted(trainer)
        if hasattr(pl_module, "denoiser_loss"):
            pl_module.denoiser_loss = getattr(self.denoiser, "loss", None)  # type: ignore[assignment]
        self.round = self._epoch = self._saved_round = -1
        self.guard.reset()
        self.healthy.reset()
        self._seed = run_seed(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first labels of this fit. A run resumed inside an epoch never calls `on_train_epoch_start`."""
        stop_at_next_batch(trainer)
        store = target_dataset(trainer).store
        if self.round < 0 and store.current is not None:
            raise ValueError(
                f"Expected an empty store for a fresh run, but {store.directory} holds the labels of an earlier one: "
                "resume it with `ckpt_path`, or name another folder."
            )
        # A run that was interrupted behind its last step has nothing more to label.
        if self.round < 0 or (self._is_due(trainer.current_epoch) and not trainer.fit_loop.done):
            self.update(trainer, pl_module)
        elif all(ranks.gather(store.has(self.round))):
            with ranks.together("Showing the pseudo labels of the checkpoint"):
                if trainer.local_rank == 0:
                    store.show(self.round)
        else:
            warnings.warn(
                f"The pseudo labels of round {self.round} are not in {store.directory}: they are made anew with the "
                "weights of the checkpoint. Keep the folder to resume exactly.",
                stacklevel=2,
            )
            self.update(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """New labels before each further epoch: the workers of its loader have not started yet."""
        if self._is_due(trainer.current_epoch):
            self.update(trainer, pl_module)
        if self._epoch == trainer.current_epoch:
            pl_module.log_dict(self.statistics, sync_dist=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse a batch with the labels of another round rather than train on it."""
        rounds = batch.get("round") if isinstance(batch, dict) else None
        if rounds is None or any(int(round) != self.round for round in rounds):
            raise RuntimeError(
                f"Expected a batch with pseudo labels of round {self.round}, but got {rounds}: its loader fetched it "
                "too early. Use the loaders of `TargetDataModule`, or a `LazyDataLoader` with its `collate`."
            )
        # Dropout and the like draw what they would have drawn without an interruption.
        torch.manual_seed(derived_seed(self._seed, trainer.current_epoch, batch_idx, trainer.global_rank))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `guard="restore"`, go back to the last healthy round if the last epoch has not been healthy."""
        if self.guard.mode != "restore":
            return
        figures = self.measure(trainer, pl_module)
        reasons = self.guard.complaints(figures) or self.guard.doubts(figures)
        if not reasons:
            return
        folder = target_dataset(trainer).store.directory
        there = all(ranks.gather(trainer.local_rank != 0 or self.healthy.is_in(folder)))
        if there:
            with ranks.together("Restoring the last healthy round"):
                if trainer.local_rank == 0:
                    self.healthy.restore(pl_module, folder)
            ranks.share_state(pl_module)
        outcome = "is restored" if there else f"was healthy, but is no longer in {folder}: the last epoch stays"
        warnings.warn(
            f"guard='restore': the network of round {self.healthy.round} {outcome}. After the last epoch "
            f"{'; '.join(reasons)}.",
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, Any]:
        """The round and its epoch. The labels stay in the store: what a checkpoint needs is not pruned."""
        self._saved_round = self.round
        remembered: dict[str, Any] = getattr(self.denoiser, "state_dict", dict)()
        watched = {"guard": self.guard.state_dict(), "healthy": self.healthy.state_dict()}
        return {"round": self.round, "epoch": self._epoch, "seed": self._seed, "denoiser": remembered, **watched}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the round of the checkpoint."""
        if remembered := state_dict["denoiser"]:
            self.denoiser.load_state_dict(remembered)  # type: ignore[union-attr]
        self.round = self._saved_round = state_dict["round"]
        self._epoch = state_dict["epoch"]
        self.guard.load_state_dict(state_dict["guard"])
        self.healthy.load_state_dict(state_dict["healthy"])
        self._seed = state_dict["seed"]

    def _labelling(self, trainer: Trainer, module: LightningModule) -> Labelling:
        return Labelling(trainer, module, self.inferer, self.batch_size)

    def _is_due(self, epoch: int) -> bool:
        return self.should_update(epoch) and self._epoch != epoch

    def _watch(self, trainer: Trainer, module: LightningModule, store: PseudoLabelStore) -> None:
        """Warn of a collapse, or keep the network that made this round if it is to be restored."""
        restores = self.guard.mode == "restore"
        figures = self.figures(trainer, module) if restores else self.statistics
        complaints = self.guard.complaints(figures)
        if complaints and trainer.is_global_zero:
            warnings.warn(
                f"In round {self.round} a collapse may have begun: {'; '.join(complaints)}. Look at the pseudo labels; "
                "train for fewer epochs or with a lower learning rate, or pass guard='restore'.",
                stacklevel=2,
            )
        if restores and not complaints and not self.guard.doubts(figures):
            with ranks.together("Keeping the healthy round"):
                self.healthy.keep(self.round, module, store.directory, writes=trainer.local_rank == 0)

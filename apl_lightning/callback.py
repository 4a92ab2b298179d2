"""Schedules, checkpoints and logs rounds of pseudo labels."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from apl_lightning._support import lightning as door
from apl_lightning._support.distributed import (
    all_or_none,
    gather,
    once_per_node,
    refuse_left_over_group,
    share_buffers,
    share_state,
)
from apl_lightning._support.hyperparameters import name_of, named, optimisation
from apl_lightning._support.lightning import Callback, LightningModule, Trainer
from apl_lightning._support.lightning_package import refuse_other_package, require_lightning
from apl_lightning._support.modes import restored_on_error
from apl_lightning._support.preemption import end_as_terminated, stop_at_next_batch
from apl_lightning._support.seeding import derived_seed, run_seed
from apl_lightning.denoisers import APL, Denoiser, LabelsAndWeights, as_denoiser
from apl_lightning.guard import Guard, GuardMode
from apl_lightning.heads import Inferer
from apl_lightning.labels import (
    GAIN,
    LARGEST_COMPONENT_SHARE,
    Labelling,
    Selection,
    label_round,
    target_dataset,
    warn_of_doubts,
)


class PseudoLabelCallback(Callback):
    """Makes pseudo labels of all target images before an epoch, again and again until they settle (`patience`).

    Every rank labels its share with the module in evaluation mode and the trainer's precision and writes it to the
    store; then all ranks see the new round at once. Before the first round the module may prepare itself on the
    target images (BatchNorm statistics, a new second head). A resumed run continues with the labels of the round that
    its checkpoint refers to.

    Before each batch, torch is seeded from the run's seed, the epoch, the batch and the rank, so that a resumed run
    draws the same random numbers (of dropout, say) as an uninterrupted one.

    The module is an `APLModule`, another `RefinementModule`, or any LightningModule that has `class_names` (background
    included) and returns the logits of two heads for images, each (B, C, *S). Its training step gets dictionaries with
    `image`, `pseudo_label`, `weight` and `round`. `inferer`, `ignore_index`, `prepare_refinement(images)` and
    `warm_up(images)`, as those of `RefinementModule`, are used if it has them.

    Before anything else, the module is validated as it came in, so that its `val/dice` is in the log at step 0.

    Logged once a round: `pseudo/confidence` (mean weight before small components are ignored), `pseudo/apart`
    (share of the foreground's weight that small components lose, if they are ignored), `pseudo/agreement` (share of
    pixels where both heads agree), `pseudo/changed` (share of labels that differ from the round before),
    `pseudo/class_ratio/<class>` (of the labels), `pseudo/estimated_gain` and `pseudo/estimated_gain/<class>` (see
    [`estimate_gain`][apl_lightning.guard.estimate_gain]; `pseudo/batch_norm_gain` is that of re-estimated BatchNorm
    statistics), `pseudo/careful_gain` (see [`careful_gain`][apl_lightning.guard.careful_gain]) and, if the data set
    has reference labels, `pseudo/dice`, which only the log reads. The gains are logged once more at the end of the run,
    those of the network that it ends with.

    Args:
        denoiser: Turns predictions into labels and weights, `APL()` by default: another method of
            [`denoisers`][apl_lightning.denoisers], or a function `(p_main, p_aux) -> (labels, weights)`.
        every_n_epochs: Make new labels before each n-th epoch.
        patience: Labels stay once their network's estimated gain has not risen by half a point for this many rounds:
            labels that are made again and again drift. `None`, or `guard="off"`, makes new ones up to the last epoch.
        inferer: Runs the module on images for the labels, as MONAI's `SlidingWindowInferer`; by default that of the
            module, which validation and the re-estimation of BatchNorm always take.
        batch_size: Images that a rank predicts at once; by default 16 slices (on a CPU at most as many as have 2^17
            pixels) or 1 volume. It is not that of training, so that labels do not depend on the number of processes.
        guard: `"restore"` ends the run with the best network, the one that came in included, if that of the last epoch
            has lost a quarter of the best estimated gain, and at least a point (see
            [`Guard`][apl_lightning.guard.Guard]); `"warn"` only says so; `"off"`.
        ignore_small_components: Whether every component of a class except its largest one in a patient gets weight 0,
            for classes whose largest components hold most of the weight; needs the patients (`case`) and the order of
            slices (see [`find_small_components`][apl_lightning.labels.find_small_components]). By default only with
            `APL`: other methods stay as published.
        largest_component_share: The share of the weight of a class that its largest components must hold;
            classes with many parts, such as lesions, are exempt.

    Raises:
        TypeError: If `denoiser` is neither a `Denoiser` nor a function; at the start of a fit, if the module has no
            `class_names`; in a label pass, if it does not return two heads.
        ValueError: If `every_n_epochs`, `patience` or `batch_size` is below 1, `largest_component_share` is not in
            [0, 1], or `guard` is unknown.

    Examples:
        >>> from apl_lightning import PseudoLabelCallback
        >>> from apl_lightning.denoisers import APL
        >>> callback = PseudoLabelCallback(denoiser=APL(temperature=2.0), every_n_epochs=2)
        >>> [epoch for epoch in range(5) if callback.should_update(epoch)]
        [0, 2, 4]
    """

    def __init__(
        self,
        denoiser: Denoiser | Callable[..., LabelsAndWeights] | None = None,
        every_n_epochs: int = 1,
        patience: int | None = 3,
        inferer: Inferer | None = None,
        batch_size: int | None = None,
        guard: GuardMode = "restore",
        ignore_small_components: bool | None = None,
        largest_component_share: float = LARGEST_COMPONENT_SHARE,
    ) -> None:
        require_lightning(self)
        for name, value in (("every_n_epochs", every_n_epochs), ("patience", patience), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
        if not 0 <= largest_component_share <= 1:
            raise ValueError(f"Expected `largest_component_share` in [0, 1], but got {largest_component_share}.")
        self.denoiser = APL() if denoiser is None else as_denoiser(denoiser)
        self.every_n_epochs = every_n_epochs
        self.patience = patience
        self.inferer = inferer
        self.batch_size = batch_size
        is_apl = isinstance(self.denoiser, APL)
        self.ignore_small_components = is_apl if ignore_small_components is None else ignore_small_components
        self.largest_component_share = largest_component_share
        self.selection = Selection(Guard(guard))
        self.round = -1
        self.statistics: dict[str, float] = {}
        self._epoch = -1  # the epoch that `round` was made for
        self._saved_round = -1  # the round that the newest checkpoint refers to
        self._checksum: int | None = None  # of the labels of `round`
        self._seed = 0
        self._has_judged = False  # whether the network of the last epoch has been measured
        self._last_gains: dict[str, torch.Tensor] = {}  # of the network that the run has ended with
        self._must_log = False  # whether the statistics of a resumed epoch are not yet in the log

    @property
    def state_key(self) -> str:
        """The name of this callback's state in checkpoints; read by a trainer when it is made."""
        refuse_other_package(self)
        return super().state_key

    def should_update(self, epoch: int) -> bool:
        """Whether new labels are due before this epoch."""
        return epoch % self.every_n_epochs == 0 and not self.has_settled

    @property
    def has_settled(self) -> bool:
        """Whether the labels stay, because the estimated gain has stopped rising."""
        if self.patience is None or self.guard.mode == "off":
            return False
        return self.round - self.selection.risen_in >= self.patience

    def update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make, write and publish the labels of a new round; if the first one fails, the module is as it came in."""
        with restored_on_error(pl_module) if self.round < 0 else nullcontext():
            self._make_round(trainer, pl_module)

    def _make_round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        labelling, seed = self._labelling(trainer, pl_module), self._next_seed
        store, round, local_rank = labelling.dataset.store, self.round + 1, trainer.local_rank
        once_per_node(local_rank, "Creating the folder of the pseudo labels", lambda: store.start(round))
        chosen = self.selection.begin(labelling, seed) if round == 0 else {}
        (share_state if round == 0 else share_buffers)(pl_module)
        share = self.largest_component_share if self.ignore_small_components else None
        self.statistics, classes = label_round(labelling, self.denoiser, round, seed, share)
        if trainer.is_global_zero:
            warn_of_doubts(self.statistics, round, name_of(self.denoiser))
        once_per_node(local_rank, "Publishing the new pseudo labels", lambda: store.publish(round))
        once_per_node(local_rank, "Deleting old pseudo labels", lambda: store.prune(keep={round, self._saved_round}))
        self.round, self._epoch, self._checksum = round, trainer.current_epoch, store.reader(round).checksum
        if self.guard.mode != "off":
            if type(self.denoiser).predict is not Denoiser.predict:
                classes = labelling.look(seed)
            chosen |= self.selection.judge(round, classes, labelling)
        else:
            self.selection.risen_in = round  # for a run that resumes with a guard
        self.statistics |= chosen

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The estimated gains of the module as it is now, by their names in the log; call it on all ranks.

        Raises:
            RuntimeError: Before the first round, and if `guard` and `batch_norm` keep nothing to compare with.
        """
        if not self.selection.first:
            raise RuntimeError(
                "Expected to know what the network predicted as it came in, but there is nothing to compare with: pass "
                "guard='warn', and measure after the first round."
            )
        share_state(pl_module)
        labelling = self._labelling(trainer, pl_module)
        return labelling.gains(self.selection.first, labelling.look(self._next_seed))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start with round 0, unless a checkpoint is loaded later; refuse what cannot work with rounds."""
        if stage != "fit":
            return
        door.refuse_sharded(trainer)
        door.refuse_other_data(trainer)
        door.refuse_weight_averaging(trainer)
        door.refuse_tuner(trainer)
        refuse_left_over_group(trainer.world_size)
        if not hasattr(pl_module, "class_names"):
            raise TypeError(
                f"Expected a module with two heads and `class_names`, but got {type(pl_module).__name__}: pass it to "
                "`APLModule`, which refines its network, or see `PseudoLabelCallback` for what a module needs."
            )
        self.round = self._epoch = self._saved_round = -1
        self._checksum = None
        self._has_judged = False
        self._last_gains = {}
        self.selection.reset()
        self._seed = run_seed()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the run depends on beside the module: denoiser, callback, optimiser and scheduler."""
        options = ("every_n_epochs", "patience", "batch_size", "ignore_small_components", "largest_component_share")
        values = {name: getattr(self, name) for name in options}
        values |= {"guard": self.guard.mode, "inferer": name_of(self.inferer)}
        found = named("denoiser", self.denoiser) | named("callback", self, values) | optimisation(trainer)
        door.log_hyperparameters(trainer, pl_module, found)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make or find the first labels of this fit: a run resumed in an epoch never calls `on_train_epoch_start`."""
        stop_at_next_batch(trainer)
        dataset = target_dataset(trainer)
        store = dataset.store
        if self.round < 0 and store.current is not None and trainer.ckpt_path is None:
            raise ValueError(
                f"Expected an empty store for a fresh run, but {store.directory} holds the labels of an earlier one: "
                "resume it with `ckpt_path`, or name another folder."
            )
        has_finished = self.round >= 0 and door.has_finished(trainer)
        if has_finished:
            door.validate(trainer)  # nothing else does
        elif self.round < 0 and trainer.global_step == 0:
            # The Dice of the network as it came in is only for the log: nothing may take it for that of an epoch.
            door.validate(trainer)
            trainer.callback_metrics.clear()
        has_labels = self.round >= 0 and self._find_labels(trainer)
        self._must_log = has_labels and self._epoch == trainer.current_epoch
        # A run that was interrupted after its last step needs no more labels.
        if not has_labels or (self._is_due(trainer.current_epoch) and not has_finished):
            self.update(trainer, pl_module)
        with all_or_none("Comparing the target images with those that have pseudo labels"):
            dataset.check_labelled_images()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make new labels before each further epoch: the workers of its loader have not started yet."""
        if self._is_due(trainer.current_epoch):
            self.update(trainer, pl_module)
        if self._epoch == trainer.current_epoch:
            pl_module.log_dict(self.statistics, sync_dist=True)
        self._must_log = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse a batch with the labels of another round."""
        rounds = batch.get("round") if isinstance(batch, dict) else None
        if rounds is None or any(int(round) != self.round for round in rounds):
            cure = "its loader fetched it too early" if rounds is not None else "a hook or a `collate` dropped the key"
            raise RuntimeError(
                f"Expected a batch with `round` {self.round}, that of its pseudo labels, but got {rounds}: {cure}. "
                "Pass the trainer the `TargetDataModule`, or use a `LazyDataLoader` with its `collate`, and keep all "
                "keys."
            )
        if self._must_log:  # this epoch began before the interruption
            pl_module.log_dict(self.statistics, sync_dist=True, on_step=False, on_epoch=True, batch_size=1)
            self._must_log = False
        # Dropout draws the same numbers after a resume.
        torch.manual_seed(derived_seed(self._seed, trainer.current_epoch, batch_idx, trainer.global_rank))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `guard="restore"`, return to the best network if that of the last epoch is harmed."""
        self._judge(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate and do the same in a run resumed after its last step, which never calls `on_train_end`."""
        if not self._has_judged:
            with door.on_root_device(trainer, pl_module):
                if self.round >= 0:
                    door.validate(trainer)
                self._judge(trainer, pl_module)
        if self._last_gains:
            metrics = trainer.callback_metrics  # with the gains of the last round until now
            for name in [name for name in metrics if name.startswith(GAIN)]:
                del metrics[name]
            metrics.update(self._last_gains)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After SIGTERM, say how to resume, and exit with 143."""
        getattr(pl_module, "on_interruption", lambda: None)()
        if door.ends_after_sigterm(exception):
            end_as_terminated(trainer, exception)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the round and the snapshot that this checkpoint refers to until the next one."""
        self._saved_round = self.round
        self.selection.snapshot.protect()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume a run with `max_steps` exactly where it has stopped; warn if a test undoes what the guard did."""
        if trainer.state.fn == "fit":
            door.continue_stopped_epoch(trainer, checkpoint)
        elif self.selection.has_restored:
            warnings.warn(
                "The guard has restored a network after this checkpoint was saved, and the checkpoint replaces it: "
                "pass the module, as in `trainer.test(module, data)`, or export the network before.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """The round, its epoch, and what guard and denoiser remember; the labels stay in the store."""
        return {
            "round": self.round,
            "checksum": self._checksum,
            "epoch": self._epoch,
            "statistics": self.statistics,
            "seed": self._seed,
            "denoiser": self.denoiser.state_dict(),
            "selection": self.selection.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the round of the checkpoint."""
        if state_dict["denoiser"]:
            self.denoiser.load_state_dict(state_dict["denoiser"])
        self.round = self._saved_round = state_dict["round"]
        self._epoch, self._checksum = state_dict["epoch"], state_dict["checksum"]
        self.selection.load_state_dict(state_dict["selection"])
        self.statistics = state_dict["statistics"]
        self._seed = state_dict["seed"]

    @property
    def guard(self) -> Guard:
        """What decides which network to end with."""
        return self.selection.guard

    def _find_labels(self, trainer: Trainer) -> bool:
        """Publish the labels of the checkpoint's round; delete them if they are damaged, or those of another run."""
        store, local_rank = target_dataset(trainer).store, trainer.local_rank
        self.selection.find_snapshot(store.directory, local_rank)
        if damage := max(gather("" if local_rank else store.damage(self.round, self._checksum))):
            warnings.warn(
                f"The labels of round {self.round} are made anew with the weights of the checkpoint, so this run does "
                f"not continue exactly. {damage}",
                stacklevel=2,
            )
            once_per_node(local_rank, "Deleting damaged pseudo labels", lambda: store.discard(self.round))
        else:
            once_per_node(local_rank, "Publishing pseudo labels", lambda: store.publish(self.round))
        return not damage

    @property
    def _next_seed(self) -> int:
        """The seed of the next pass over the target images."""
        return derived_seed(self._seed, self.round + 1)

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_judged = True
        if self.guard.mode == "off" or self.round < 0:
            return
        # The last figures in the log are those of the network that the run ends with.
        gains = self.selection.end(self._labelling(trainer, pl_module), self._next_seed)
        if self.selection.has_restored:
            door.validate(trainer)
        if gains:
            self._last_gains = {name: torch.tensor(gain) for name, gain in gains.items()}
            for logger in trainer.loggers:
                logger.log_metrics(gains, trainer.global_step)

    def _labelling(self, trainer: Trainer, module: LightningModule) -> Labelling:
        compares = self.guard.mode != "off" or getattr(module, "chooses_batch_norm", False)
        sample = self.selection.sample_of(len(target_dataset(trainer))) if compares else None
        return Labelling(trainer, module, sample, self.inferer, self.batch_size)

    def _is_due(self, epoch: int) -> bool:
        return self.should_update(epoch) and self._epoch != epoch

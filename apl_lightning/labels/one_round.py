"""The labels of one round: those of the denoiser, or balanced ones, without small components."""

from apl_lightning._support.distributed import once_per_node
from apl_lightning.denoisers import APL, CBST, Denoiser
from apl_lightning.guard import Classes
from apl_lightning.labels.labelling import Labelling
from apl_lightning.store import complete_round

BALANCED_ROUNDS = 2


def label_round(
    labelling: Labelling,
    denoiser: Denoiser,
    round: int,
    seed: int,
    largest_component_share: float | None,
    is_far: bool,
) -> tuple[dict[str, float], Classes]:
    """Write the labels of a round, on all ranks; returns statistics for the log, and what the network predicts.

    With `APL`, the labels of the first two rounds are those of `CBST` if the network `is_far` from the target images or
    a class is scattered.

    Args:
        labelling: Labels this rank's share.
        denoiser: Turns predictions into labels and weights.
        round: The number of the round.
        seed: The seed of the label pass.
        largest_component_share: See `find_small_components`; `None` counts small components.
        is_far: Whether the network hardly knows the target images.
    """
    store, node = labelling.dataset.store, labelling.local_rank
    may_balance = isinstance(denoiser, APL) and round < BALANCED_ROUNDS
    balances = may_balance and is_far
    statistics, classes = _label(labelling, CBST() if balances else denoiser, round, seed)
    if largest_component_share is None:
        return statistics, classes
    small = labelling.small_components(round, largest_component_share)
    if small.scattered and may_balance and not balances:
        once_per_node(node, "Replacing scattered labels", lambda: store.start(round))
        statistics, classes = _label(labelling, CBST(), round, seed)
        small = labelling.small_components(round, largest_component_share)
    return statistics | labelling.ignore(round, small), classes


def _label(labelling: Labelling, denoiser: Denoiser, round: int, seed: int) -> tuple[dict[str, float], Classes]:
    store, node = labelling.dataset.store, labelling.local_rank
    found = labelling.label(denoiser, round, seed)
    complete_round(store.folder(round), responsible=node == 0)
    once_per_node(node, "Joining the new pseudo labels", lambda: store.join(round))
    return found

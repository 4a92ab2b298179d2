"""One round of labels: those of the denoiser, without small components."""

from apl_lightning._support.distributed import once_per_node
from apl_lightning.denoisers import Denoiser
from apl_lightning.guard import Classes
from apl_lightning.labels.labelling import Labelling
from apl_lightning.labels.small_components import find_small_components
from apl_lightning.store import complete_round


def label_round(
    labelling: Labelling, denoiser: Denoiser, round: int, seed: int, largest_component_share: float | None
) -> tuple[dict[str, float], Classes]:
    """Write the labels of a round, on all ranks; returns statistics for the log, and what the network predicts.

    Args:
        labelling: Labels this rank's share.
        denoiser: Turns predictions into labels and weights.
        round: The number of the round.
        seed: The seed of the label pass.
        largest_component_share: See `find_small_components`; `None` keeps small components.
    """
    store, local_rank = labelling.dataset.store, labelling.local_rank
    statistics, classes = labelling.label(denoiser, round, seed)
    complete_round(store.folder(round), responsible=local_rank == 0)
    once_per_node(local_rank, "Joining the new pseudo labels", lambda: store.join(round))
    if largest_component_share is None:
        return statistics, classes
    reader = store.reader(round)
    small = find_small_components(reader, labelling.num_classes, largest_component_share)
    once_per_node(local_rank, "Ignoring small components", lambda: reader.ignore(small.pixels))
    return {**statistics, "pseudo/apart": small.share}, classes

"""Refinement of an nnU-Net, with the estimated gain of each fold as text."""

import sys
from typing import Any

from apl_lightning.nnunet import refine


def nnunet(**options: Any) -> None:
    """Refine a trained nnU-Net v2 on unlabelled images, and say by how many points of Dice each fold gains by estimate.

    Args:
        options: Those of [`nnunet.refine`][apl_lightning.nnunet.refine].
    """
    for fold, logged in refine(**options).items():
        gain = logged.get("pseudo/estimated_gain")
        text = "no estimate" if gain is None else f"estimated gain {100 * gain:+.1f} points of Dice"
        sys.stdout.write(f"{fold}: {text}\n")

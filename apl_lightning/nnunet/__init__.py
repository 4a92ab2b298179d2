"""Refine nnU-Nets: from a results folder of nnU-Net v2 to a results folder of nnU-Net v2."""

from apl_lightning.nnunet.refining import refine

__all__ = ["refine"]

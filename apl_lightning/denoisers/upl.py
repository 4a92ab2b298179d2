"""UPL-SFDA (Wu et al., TMI 2023): keep confident pixels of the mean over views, in one component per class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apl_lightning._support.connected import largest_component
from apl_lightning.denoisers.base import Denoiser
from apl_lightning.denoisers.confidence import merge
from apl_lightning.denoisers.predictor import Predictor


@dataclass(eq=False)
class UPL(Denoiser):
    r"""Uncertainty-aware pseudo labels from rotated views.

    $p$ is the mean over K views. View k rotates the image by $90° \cdot k$ and uses D_m for even and D_a for odd k.
    Weight 1 where $p_{\hat y} > \tau$ and, for foreground classes, in the largest connected component of the class in
    the image. The original has K decoders and predicts the views in each training step; here the two heads take turns,
    once a round.

    Args:
        views: K.
        tau: The threshold.
        plane: The two axes of (B, C, *S) that span the plane of rotation: (2, 3), axial, for volumes in RAS.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import torch
        >>> from apl_lightning.denoisers import UPL
        >>> p = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.9]).view(1, 1, 1, 5)  # foreground in two components
        >>> p = torch.cat([1 - p, p], dim=1)
        >>> labels, weights = UPL(tau=0.8)(p, p)
        >>> weights.tolist()
        [[[1.0, 0.0, 1.0, 1.0, 1.0]]]
    """

    views: int = 4
    tau: float = 0.9
    plane: tuple[int, int] = (-2, -1)

    def __post_init__(self) -> None:
        if self.views < 1 or not 0 < self.tau < 1:
            raise ValueError(f"Expected `views` of at least 1 and `tau` between 0 and 1, but got {self}.")
        if not isinstance(self.plane, Sequence) or len(set(self.plane)) != 2 or set(self.plane) & {0, 1}:
            raise ValueError(f"Expected `plane` to be two spatial axes of (B, C, *S), from 2 on, but got {self.plane}.")

    def predict(self, predictor: Predictor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the views, returned for both heads."""
        total = torch.zeros(())
        for view in range(self.views):
            probabilities = predictor(torch.rot90(images, view, self.plane))[view % 2]
            total = total.to(probabilities) + torch.rot90(probabilities, -view, self.plane)
        mean = total / self.views
        return mean, mean

    def __call__(self, p_main: Tensor, p_aux: Tensor) -> tuple[Tensor, Tensor]:
        confidence, labels = merge(p_main, p_aux).max(dim=1)
        weights = (confidence > self.tau).float()
        for label, weight in zip(labels, weights, strict=True):
            for number in label.unique().tolist():
                mask = (label == number) & (weight > 0)
                if number and mask.any():
                    largest = torch.from_numpy(largest_component(mask.cpu().numpy())).to(mask.device)
                    weight[mask & ~largest] = 0
        return labels, weights

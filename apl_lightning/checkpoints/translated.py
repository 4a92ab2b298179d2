"""A frozen translator in front of a segmenter: target image -> source style -> class scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Translated(nn.Module):
    r"""CycleGAN's second wiring: S(G(x)), with G from target to source and S trained on the source.

    G stays as it is: it takes no gradient, and is in evaluation mode always. Its images lie in [-1, 1]; S gets them in
    its own range: `low + (G(x) + 1) / 2 (high - low)`, or what its `preprocess` makes of them.

    Args:
        generator: The translator from target to source (B, C, H, W) -> (B, C', H, W) in [-1, 1]; where A is the source,
            CycleGAN's `G_B`.
        segmenter: Any segmentation network.
        value_range: The values that the segmenter takes for black and white; (-1, 1) changes nothing. If `None`, the
            segmenter's own `preprocess` is used.

    Raises:
        ValueError: If `value_range` is `None` and the segmenter has no `preprocess`.

    Examples:
        >>> import torch
        >>> from apl_lightning.checkpoints import ResnetGenerator, Translated
        >>> segmenter = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 5, 1))
        >>> model = Translated(ResnetGenerator(1, 1, width=8), segmenter, value_range=(0, 1))
        >>> model(torch.rand(2, 1, 64, 64)).shape
        torch.Size([2, 5, 64, 64])
    """

    def __init__(
        self, generator: nn.Module, segmenter: nn.Module, value_range: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        if value_range is None and not hasattr(segmenter, "preprocess"):
            raise ValueError(
                f"Expected `value_range`, the values of black and white that {type(segmenter).__name__} was trained "
                "on, as it has no `preprocess`: pass (0, 1) or (-1, 1), say."
            )
        self.generator = generator.requires_grad_(False)
        self.segmenter = segmenter
        self.value_range = value_range
        self.train(segmenter.training)

    def train(self, mode: bool = True) -> Translated:
        """Set the mode of the segmenter; the generator stays in evaluation mode."""
        super().train(mode)
        self.generator.eval()
        return self

    def forward(self, image: Tensor) -> Any:
        """What the segmenter makes of the translated image."""
        with torch.no_grad():
            grey = ((self.generator(image) + 1) / 2).clamp(0, 1)
            if self.value_range is None:
                translated = self.segmenter.preprocess(grey)  # type: ignore[operator] # checked in __init__
            else:
                low, high = self.value_range
                translated = low + grey * (high - low)
        return self.segmenter(translated)

    def preprocess(self, image: Tensor) -> Tensor:
        """A raw image as the generator takes it."""
        prepared: Tensor = self.generator.preprocess(image)  # type: ignore[operator]
        return prepared

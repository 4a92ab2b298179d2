"""A segmentation network behind a frozen image translator."""

from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning.checkpoints.networks.raw_image import ZScorePreprocess


class Translated(nn.Module):
    """Translate target images to the source domain, then segment them with a network that was trained on the source.

    The generator is frozen: it has no gradient, always stays in evaluation mode and keeps its BatchNorm statistics. Its
    output in [-1, 1] is rescaled to `value_range`, or rescaled to [0, 1] and passed to the segmenter's `preprocess`.

    Args:
        generator: Translator from target (B, C, H, W) to source (B, C', H, W), with values in [-1, 1]. This is
            CycleGAN's `G_B` if A is the source.
        segmenter: Segmentation network.
        value_range: Values of black and white in the segmenter's training images. `None` uses the segmenter's
            `preprocess`.

    Raises:
        ValueError: If `value_range` is `None` and the segmenter has no `preprocess`, or one for whole volumes.

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
                f"Expected `value_range`, but got None and {type(segmenter).__name__} has no `preprocess`: pass the "
                "values of black and white in its training images, such as (0, 1) or (-1, 1)."
            )
        if value_range is None and isinstance(segmenter, ZScorePreprocess):
            raise ValueError(
                f"Expected `value_range`, but got None and {type(segmenter).__name__} normalises all slices of a "
                "volume together, which a batch does not have: pass the values of black and white in its training "
                "images."
            )
        self.generator = generator.requires_grad_(False)
        self.generator.is_fixed = True  # type: ignore[assignment]
        self.segmenter = segmenter
        self.value_range = value_range
        self.train(segmenter.training)

    def train(self, mode: bool = True) -> "Translated":
        """Set the mode of the segmenter; the generator stays in evaluation mode."""
        super().train(mode)
        self.generator.eval()
        return self

    def forward(self, image: Tensor) -> Any:
        """Return the segmenter's output for the translation of a preprocessed target image (B, C, H, W)."""
        with torch.no_grad():
            unit = ((self.generator(image) + 1) / 2).clamp(0, 1)
            if self.value_range is None:
                translated = self.segmenter.preprocess(unit)  # type: ignore[operator] # checked in __init__
            else:
                low, high = self.value_range
                translated = low + unit * (high - low)
        return self.segmenter(translated)

    def preprocess(self, image: Tensor) -> Tensor:
        """Apply the generator's `preprocess` to a raw image (C, H, W) or (B, C, H, W).

        Raises:
            TypeError: If the generator has no `preprocess`.
        """
        if not hasattr(self.generator, "preprocess"):
            raise TypeError(
                f"Expected a generator with a method `preprocess`, but {type(self.generator).__name__} has none: "
                "convert raw images to inputs of the generator yourself."
            )
        prepared: Tensor = self.generator.preprocess(image)  # type: ignore[operator]
        return prepared

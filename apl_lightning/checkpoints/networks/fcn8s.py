"""FCN-8s on VGG-16, the second network in CyCADA (Long et al., CVPR 2015)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning.checkpoints.networks.raw_image import ImageNetPreprocess
from apl_lightning.checkpoints.networks.vgg import vgg_layers

_VGG_STAGES = ((64, 2, 1), (128, 2, 1), (256, 3, 1), (512, 3, 1), (512, 3, 1))
# CyCADA's checkpoints do not group the score layers in one module.
_OFFICIAL_NAMES = {
    "scores.last.": "vgg_head.6.",
    **{f"scores.{name}.": f"{name}." for name in ("score_pool3", "score_pool4", "upscore2", "upscore_pool4")},
}


class _Bilinear(nn.Module):
    """Upsample each class separately with a fixed bilinear kernel."""

    def __init__(self, factor: int, num_classes: int) -> None:
        super().__init__()
        self.factor = factor
        ramp = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
        kernel = torch.zeros(num_classes, num_classes, 2 * factor, 2 * factor)
        kernel[range(num_classes), range(num_classes)] = torch.outer(ramp, ramp)
        self.register_buffer("w", kernel)
        self.w: Tensor

    def forward(self, scores: Tensor) -> Tensor:
        return F.conv_transpose2d(scores, self.w.to(scores.dtype), stride=self.factor)


def _crop(scores: Tensor, offset: int, reference: Tensor) -> Tensor:
    height, width = reference.shape[2:]
    return scores[:, :, offset : offset + height, offset : offset + width]


class _Scores(nn.Module):
    """The three score layers and their fusion, as one classifier of features at three depths."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(4096, num_classes, 1)
        self.upscore2 = _Bilinear(2, num_classes)
        self.score_pool4 = nn.Conv2d(512, num_classes, 1)
        self.upscore_pool4 = _Bilinear(2, num_classes)
        self.score_pool3 = nn.Conv2d(256, num_classes, 1)

    def forward(self, fc7: Tensor, pool4: Tensor, pool3: Tensor) -> Tensor:
        coarse = self.upscore2(self.last(fc7))
        middle = self.upscore_pool4(coarse + _crop(self.score_pool4(0.01 * pool4), 5, coarse))
        fine: Tensor = middle + _crop(self.score_pool3(0.0001 * pool3), 9, middle)
        return fine


class FCN8s(ImageNetPreprocess, nn.Module):
    """VGG-16 with skip connections from pool3 and pool4, which returns logits at the size of the image.

    The state dict has CyCADA's keys. In the network, the module `scores` contains the three score layers, so that
    APL can add a second classifier with the same inputs.

    Args:
        num_classes: Channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.vgg = vgg_layers(_VGG_STAGES, nn.MaxPool2d(2, ceil_mode=True))
        head = (nn.Conv2d(512, 4096, 7), nn.Conv2d(4096, 4096, 1))
        self.vgg_head = nn.Sequential(*(m for conv in head for m in (conv, nn.ReLU(inplace=True), nn.Dropout2d())))
        self.scores = _Scores(num_classes)
        self.upscore8 = _Bilinear(8, num_classes)
        self._register_state_dict_hook(_to_official)
        self._register_load_state_dict_pre_hook(_from_official)

    def forward(self, image: Tensor) -> Tensor:
        """Map a preprocessed image (B, 3, H, W) to logits (B, num_classes, H, W)."""
        padded = F.pad(image, (99, 99, 99, 99))
        pool3 = self.vgg[:17](padded)
        pool4 = self.vgg[17:24](pool3)
        fc7 = self.vgg_head(self.vgg[24:](pool4))
        return _crop(self.upscore8(self.scores(fc7, pool4, pool3)), 31, image)


def _rename(state: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    for key in list(state):
        for old, new in names.items():
            if key.startswith(prefix + old):
                state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)
                break


def _to_official(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    _rename(state, prefix, _OFFICIAL_NAMES)


def _from_official(state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix, {official: name for name, official in _OFFICIAL_NAMES.items()})

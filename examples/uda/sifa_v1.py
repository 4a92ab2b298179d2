"""Adapt images and features together: SIFA (Chen et al., AAAI 2019), implemented from the paper.

A generator G translates source images x_s to the target domain. One encoder E serves the segmenter C and the decoder U,
which translates target images x_t to the source domain. Labels of the source train C(E(G(x_s))):

    L = L_adv(G) + L_adv(U(E)) + 10 |U(E(G(x_s))) - x_s| + 10 |G(U(E(x_t))) - x_t|
        + L_seg(C(E(G(x_s)))) + 0.1 L_adv(C(E(x_t))) + 0.1 L_adv(U(E(x_t)))

All adversarial losses are least squares. Those of the second line make predictions and translations of target images
look like those of translated source images; the latter is a second answer of the discriminator of source images. In
these small networks the encoder gets a tenth of the gradient of the first line.
"""

from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from adversarial import FAKE, FROM_SOURCE, FROM_TARGET, REAL, adam_pair, least_squares, patch_gan
from cyclegan import CYCLE
from source_training import moved, segmentation_loss
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNMENT = 0.1  # weight of the loss that aligns translations of target images
SHARE_OF_ENCODER = 0.1  # how much of the gradient of the images' losses the encoder gets


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.InstanceNorm2d(width, affine=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norms[1](self.second(F.relu(self.norms[0](self.first(x))))))


class Decoder(nn.Module):
    """U: a convolution, four residual blocks, three transposed convolutions and a convolution.

    Args:
        channels: Channels of the features of the encoder.
        width: Channels of the widest layer.
    """

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.InstanceNorm2d(width), nn.ReLU()]
        layers += [_Residual(width) for _ in range(4)]
        for before, after in ((width, width // 2), (width // 2, width // 2), (width // 2, width // 4)):
            up = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)
            layers += [up, nn.InstanceNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width // 4, 1, 7, padding=3))

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Map features (B, channels, H / 8, W / 8) and their images (B, 1, H, W) to images in [-1, 1]."""
        return torch.tanh(image + self.layers(features))


class _SourceJudge(nn.Module):
    """A PatchGAN with two answers: whether an image is real, and which domain its translation comes from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = patch_gan(1, width)
        final = self.body[-1]
        self.body[-1] = nn.Conv2d(final.in_channels, 2, 4, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        real, domain = self.body(image).split(1, dim=1)
        return real, domain


class SIFAv1Module(pl.LightningModule):
    """Synergistic image and feature adaptation, on preprocessed images.

    Args:
        segmenter: `apl_lightning.checkpoints.SIFA`, with the encoder E and the segmenter C.
        generator: `apl_lightning.checkpoints.SIFAGenerator`, G.
        classes: Number of channels of the logits.
        width: Channels of the first layer of the discriminators.
        learning_rate: Learning rate of Adam for all networks.
    """

    # Weights of the segmentation and the adversarial loss of each segmenter.
    levels: ClassVar[dict[str, tuple[float, float]]] = {"seg": (1.0, 0.1)}

    def __init__(
        self, segmenter: Any, generator: nn.Module, classes: int, width: int = 64, learning_rate: float = 5e-4
    ) -> None:
        super().__init__()
        self.segmenter, self.generator = segmenter, generator
        features = segmenter.seg.model[0].layer[0].in_channels
        self.decoder = Decoder(features, max(8, features // 4))
        self.judges = nn.ModuleDict({level: patch_gan(classes, width) for level in self.levels})
        self.judges.update({"target": patch_gan(1, width), "source": _SourceJudge(width)})
        self.learning_rate = learning_rate
        self.criterion = segmentation_loss()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, dict[str, Tensor]]) -> None:
        source, label = moved(batch["source"]["image"][:, :1], batch["source"]["label"])
        target, _ = moved(batch["target"]["image"][:, :1], batch["source"]["label"])
        network_optimizer, judge_optimizer = self.optimizers()

        network_optimizer.zero_grad()
        self.judges.requires_grad_(False)
        fake_target = self.generator(self._input(source))
        # One forward pass for both, so that the batch statistics match the running statistics of BatchNorm.
        both = torch.cat([fake_target, target])
        lower, features = self.segmenter.enc(self._input(both))
        reconstructed, fake_source = self.decoder(features, both).split(len(source))
        predictions = {"seg": self.segmenter.seg(features)}
        if self.segmenter.seg_ll is not None:
            predictions["seg_ll"] = self.segmenter.seg_ll(lower)
        levels = {level: logits.float().split(len(source)) for level, logits in predictions.items()}
        images = self._image_losses(source, target, fake_target, fake_source, reconstructed)
        labels = self._segmentation_losses(levels, label) | {"alignment": self._alignment_loss(fake_source)}
        self.manual_backward(_sum(images), retain_graph=True)
        for parameter in self.segmenter.enc.parameters():
            parameter.grad.mul_(SHARE_OF_ENCODER)
        # Segmentation and alignment train the encoder and the segmenter, not the generator and the decoder.
        self.manual_backward(_sum(labels), inputs=list(self.segmenter.parameters()))
        network_optimizer.step()

        judge_optimizer.zero_grad()
        self.judges.requires_grad_(True)
        self.manual_backward(self._judge_loss(source, target, fake_target, fake_source, reconstructed, levels))
        judge_optimizer.step()
        self.log_dict({f"adapt/{name}": loss for name, loss in (images | labels).items()}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return adam_pair(self, self.learning_rate)

    def _image_losses(
        self, source: Tensor, target: Tensor, fake_target: Tensor, fake_source: Tensor, reconstructed: Tensor
    ) -> dict[str, Tensor]:
        real, _ = self.judges["source"](fake_source)
        again = self.generator(self._input(fake_source))
        return {
            "deception": least_squares(self.judges["target"](fake_target), REAL) + least_squares(real, REAL),
            "cycle": CYCLE * (F.l1_loss(reconstructed, source) + F.l1_loss(again, target)),
        }

    def _alignment_loss(self, fake_source: Tensor) -> Tensor:
        _, domain = self.judges["source"](fake_source)
        return ALIGNMENT * least_squares(domain, FROM_SOURCE)

    def _segmentation_losses(self, levels: dict[str, tuple[Tensor, Tensor]], label: Tensor) -> dict[str, Tensor]:
        losses = {}
        for level, (segmentation, adversarial) in self.levels.items():
            of_source, of_target = levels[level]
            losses[level] = segmentation * self.criterion(of_source, label[:, None])
            judged = self.judges[level](of_target.softmax(dim=1))
            losses[f"{level}_deception"] = adversarial * least_squares(judged, FROM_SOURCE)
        return losses

    def _judge_loss(
        self,
        source: Tensor,
        target: Tensor,
        fake_target: Tensor,
        fake_source: Tensor,
        reconstructed: Tensor,
        levels: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        of_target, of_source = self.judges["target"], self.judges["source"]
        loss = least_squares(of_target(target), REAL) + least_squares(of_target(fake_target.detach()), FAKE)
        fake, from_target = of_source(fake_source.detach())
        _, from_source = of_source(reconstructed.detach())
        loss = loss + least_squares(of_source(source)[0], REAL) + least_squares(fake, FAKE)
        loss = loss + least_squares(from_source, FROM_SOURCE) + least_squares(from_target, FROM_TARGET)
        for level, predictions in levels.items():
            for logits, domain in zip(predictions, (FROM_SOURCE, FROM_TARGET), strict=True):
                loss = loss + least_squares(self.judges[level](logits.detach().softmax(dim=1)), domain)
        return loss / 2

    def _input(self, image: Tensor) -> Tensor:
        """Repeat the channel of (B, 1, *S) as often as the networks need it."""
        return image.expand(-1, self.segmenter.in_channels, -1, -1)


def _sum(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()

"""Adapt a network by adversarial entropy minimisation: ADVENT (Vu et al., CVPR 2019), implemented from the paper.

    python examples/uda/advent.py --data DIR --source source.pt --out adapted.pt

This adaptation, before refinement, needs the source data. A discriminator D learns to distinguish the entropy maps of
target predictions from those of source predictions. The segmentation network learns the source labels and to deceive D:

    I = -p log p / log C                                (weighted self-information, one map per class)
    L = L_seg(source) + 0.001 * BCE(D(I_target), "source")

`source.pt` is a state dict that `examples/abdomen.py` saves in its output folder. `examples/benchmarks/methods.py`
refines networks that are adapted in this way as the base `advent`.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.append(str(Path(__file__).resolve().parents[1]))

from networks import NETWORKS, build_network
from slices import Slices, class_names
from source_training import random_affine, random_remapping

FROM_TARGET, FROM_SOURCE = 0.0, 1.0


def self_information(logits: Tensor) -> Tensor:
    """The weighted self-information maps -p log p / log C, (B, C, *S), between 0 and 1 / (e log C)."""
    log_p = logits.log_softmax(dim=1)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def discriminator(classes: int, width: int = 64) -> nn.Sequential:
    """Four strided convolutions and a classifier as in DCGAN, with one logit per patch."""
    layers: list[nn.Module] = []
    channels = [classes, width, 2 * width, 4 * width, 8 * width]
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, stride=2, padding=1))


class AdventModule(pl.LightningModule):
    """Adversarial adaptation on pairs of a labelled source batch and an unlabelled target batch.

    Args:
        model: The source network, which is adapted in place.
        classes: Number of channels of the logits.
        adversarial_weight: Weight of the adversarial loss.
        learning_rate: Learning rate of the network; that of the discriminator is 1e-4.
    """

    def __init__(
        self, model: nn.Module, classes: int, adversarial_weight: float = 1e-3, learning_rate: float = 5e-4
    ) -> None:
        super().__init__()
        self.model = model
        self.discriminator = discriminator(classes)
        self.adversarial_weight = adversarial_weight
        self.learning_rate = learning_rate
        self.criterion = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, dict[str, Tensor]]) -> None:
        image, label = random_affine(batch["source"]["image"], batch["source"]["label"])
        target = batch["target"]["image"]
        # One forward pass for both, so that the batch statistics match the running statistics of BatchNorm.
        both = self.model(torch.cat([random_remapping(image), target]))
        source_logits, target_logits = both[: len(image)], both[len(image) :]
        network_optimizer, discriminator_optimizer = self.optimizers()

        network_optimizer.zero_grad()
        segmentation = self.criterion(source_logits, label[:, None])
        deception = self._adversarial_loss(self_information(target_logits), FROM_SOURCE)
        self.manual_backward(segmentation + self.adversarial_weight * deception)
        network_optimizer.step()

        discriminator_optimizer.zero_grad()
        discrimination = self._adversarial_loss(self_information(source_logits).detach(), FROM_SOURCE)
        discrimination += self._adversarial_loss(self_information(target_logits).detach(), FROM_TARGET)
        self.manual_backward(discrimination / 2)
        discriminator_optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"advent/segmentation": segmentation, "advent/deception": deception}, prog_bar=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        optimizers = [
            torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=1e-4),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-4, betas=(0.9, 0.99)),
        ]
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizers, [torch.optim.lr_scheduler.PolynomialLR(o, steps, power=0.9) for o in optimizers]

    def _adversarial_loss(self, maps: Tensor, domain: float) -> Tensor:
        logits = self.discriminator(maps)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


def adapt(
    model: nn.Module, classes: int, source: Dataset[object], target: Dataset[object], trainer: pl.Trainer
) -> None:
    """Train `model` in place on equally many labelled source and unlabelled target images per step."""
    loaders = {
        name: DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True)
        for name, dataset in (("source", source), ("target", target))
    }
    trainer.fit(AdventModule(model, classes), pl.utilities.CombinedLoader(loaders, "max_size_cycle"))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with meta.json, mr/ and ct/")
    parser.add_argument("--source", type=Path, required=True, help="state dict of the source network")
    parser.add_argument("--out", type=Path, required=True, help="file for the adapted state dict")
    parser.add_argument("--network", choices=NETWORKS, default="monai-unet")
    parser.add_argument("--size", type=int, default=128, help="number of rows and columns of a slice")
    parser.add_argument("--epochs", type=int, default=5, help="epochs over the target images")
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of the patients, for a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    pl.seed_everything(arguments.seed, workers=True)
    classes = len(class_names(arguments.data))
    model = build_network(arguments.network, classes)
    model.load_state_dict(torch.load(arguments.source, weights_only=True))
    source, target = (
        Slices(arguments.data, split, arguments.size, labelled, arguments.fraction)
        for split, labelled in (("source_train", True), ("target_adapt", False))
    )
    trainer = pl.Trainer(
        max_epochs=arguments.epochs, devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    adapt(model, classes, source, target, trainer)
    torch.save(model.state_dict(), arguments.out)


if __name__ == "__main__":
    main()

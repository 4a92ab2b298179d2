"""Networks of a few numbers, and one training step of an adaptation system, for losses by hand."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning import checkpoints


class Affine(nn.Module):
    """A generator or a discriminator: scales the sum of the first channels and adds a constant."""

    def __init__(self, scale: float, shift: float = 0.0, channels: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.shift = shift
        self.channels = channels

    def forward(self, image: Tensor) -> Tensor:
        return self.scale * image[:, : self.channels].sum(dim=1, keepdim=True) + self.shift


class Logits(Affine):
    """A segmenter: the logit of the first of three classes is a multiple of the image, the other two are 0."""

    def preprocess(self, image: Tensor) -> Tensor:
        return 2 * image

    def forward(self, image: Tensor) -> Tensor:
        return F.pad(super().forward(image), (0, 0, 0, 0, 0, 2))


class TwoLevels(checkpoints.DeepLabV2):
    """A segmenter that returns the logits of the lower level first, as DeepLabV2 does."""

    def __init__(self, aux: float, main: float) -> None:
        nn.Module.__init__(self)
        self.aux, self.main = Logits(aux), Logits(main)

    def preprocess(self, image: Tensor) -> Tensor:
        return 2 * image

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.aux(image), self.main(image)


class Encoder(nn.Module):
    """SIFA's encoder: lower features, and features that are a multiple of them."""

    def __init__(self, lower: float, upper: float, channels: int) -> None:
        super().__init__()
        self.lower, self.upper = Affine(lower, channels=channels), Affine(upper)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        lower = self.lower(image)
        return lower, self.upper(lower)


class Decoder(Affine):
    """SIFA's decoder: the features and half of the image."""

    def forward(self, features: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features) + 0.5 * image


class TwoAnswers(nn.Module):
    """SIFA's discriminator of source images: whether the image is real, and the domain of its translation."""

    def __init__(self, real: float, domain: float) -> None:
        super().__init__()
        self.real, self.domain = Affine(real), Affine(domain)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.real(image), self.domain(image)


class FirstLogit(nn.Module):
    """A criterion of known value: the logit of the first class times the label."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        return (logits[:, :1] * label).mean()


def constant_batch(source: float, target: float) -> dict[str, dict[str, Tensor]]:
    """Two images of each domain, the same everywhere; all labels are 1."""
    images = {"source": torch.full((2, 1, 4, 4), source), "target": torch.full((2, 1, 4, 4), target)}
    label = torch.ones(2, 4, 4).long()
    return {"source": {"image": images["source"], "label": label}, "target": {"image": images["target"]}}


def known_transform(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for a random transform: adds 0.1 to images and 1 to labels."""
    return image + 0.1, label + 1


def random_batch() -> dict[str, dict[str, Tensor]]:
    """Two images of each domain; the labels go with the images."""
    images = torch.rand(4, 1, 32, 32)
    label = (images[:2, 0] * 4.99).long()
    return {"source": {"image": images[:2], "label": label}, "target": {"image": images[2:]}}


class Step:
    """Runs one training step that changes nothing; each optimiser has to forget its gradients before its step.

    Attributes:
        losses: The losses in the order of their backward passes.
        gradients: At the step of each optimiser, the gradients that are not 0, by parameter.
        moved: The parts of the module with such a gradient.
        logged: What the step logs.
        schedulers: How often each scheduler makes a step.
    """

    def __init__(self, module: Any, batch: dict[str, dict[str, Tensor]]) -> None:
        self.module = module
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.logged: dict[str, float] = {}
        self.schedulers = [0, 0]
        self.cleared: set[int] = set()
        optimizers = [SimpleNamespace(zero_grad=partial(self._clear, n), step=partial(self._note, n)) for n in (0, 1)]
        module.optimizers = lambda: optimizers
        module.lr_schedulers = lambda: [SimpleNamespace(step=partial(self._note_scheduler, n)) for n in (0, 1)]
        module.manual_backward = self._backward
        module.log_dict = lambda values, **_: self.logged.update({name: value.item() for name, value in values.items()})
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)  # of the step before
        module.train().training_step(batch)
        self.moved = [{name.split(".")[0] for name in gradients} for gradients in self.gradients]

    def _backward(self, loss: Tensor, **options: Any) -> None:
        self.losses.append(loss.item())
        loss.backward(**options)

    def _clear(self, number: int) -> None:
        self.cleared.add(number)
        self.module.zero_grad()

    def _note(self, number: int) -> None:
        self.cleared.remove(number)
        found = {name: parameter.grad for name, parameter in self.module.named_parameters()}
        self.gradients.append({name: grad.clone() for name, grad in found.items() if grad is not None and grad.any()})

    def _note_scheduler(self, number: int) -> None:
        self.schedulers[number] += 1

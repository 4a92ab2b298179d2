"""Drawn images whose classes differ only in how they lie to each other, and small networks that learn them."""

from __future__ import annotations

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional as F

# Offsets from the centre of a phantom to its parts, in pixels: no turn or flip maps them onto each other.
PARTS = {2: ((0, 0), (-7, 0), (0, 5)), 3: ((0, 0, 0), (-5, 0, 0), (0, 4, 0), (0, 0, 3))}
SIZE = {2: 32, 3: 16}
RADIUS = {2: 2.5, 3: 1.8}
MOVE = {2: 3, 3: 1}


def phantoms(count: int, dimensions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, *S) with bright balls on a dark ground, and labels (B, *S): the part that each ball is."""
    generator = torch.Generator().manual_seed(seed)
    size = SIZE[dimensions]
    axes = torch.meshgrid(*[torch.arange(float(size))] * dimensions, indexing="ij")
    grid = torch.stack(axes)
    labels = torch.zeros(count, *[size] * dimensions, dtype=torch.long)
    for label in labels:
        centre = size / 2 + MOVE[dimensions] * (torch.rand(dimensions, generator=generator) * 2 - 1)
        for number, offset in enumerate(PARTS[dimensions], start=1):
            place = (centre + torch.tensor(offset)).view(-1, *[1] * dimensions)
            label[(grid - place).square().sum(dim=0) < RADIUS[dimensions] ** 2] = number
    noise = torch.randn(labels.shape, generator=generator)
    return (0.2 + 0.6 * (labels > 0) + 0.05 * noise)[:, None], labels


def train(dimensions: int, norm: str, steps: int) -> nn.Module:
    """A network that has learnt the phantoms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classes = 1 + len(PARTS[dimensions])
        network = UNet(dimensions, 1, classes, channels=(8, 16, 32), strides=(2, 2), norm=norm, num_res_units=1)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        weight = torch.tensor([0.1] + [1.0] * (classes - 1))
        images, labels = phantoms(128, dimensions, seed=1)
        for step in range(steps):
            part = torch.arange(8) + 8 * (step % 16)
            optimizer.zero_grad()
            F.cross_entropy(network(images[part]), labels[part], weight).backward()
            optimizer.step()
            schedule.step()
    return network.eval()

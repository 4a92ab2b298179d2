"""Train a new second head on the predictions of the first one."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from apl_lightning._support.modes import evaluating, frozen, trainable
from apl_lightning.heads.model import DualHeadModel


def warm_up_second_head(model: DualHeadModel, images: Iterable[Tensor], steps: int = 300, lr: float = 1e-2) -> None:
    """Fit the second head to the probabilities of the first one, with fixed features.

    Minimises the cross-entropy between p_m (fixed) and p_a with Adam, with a linear decay of the learning rate to 0.
    Only the parameters of `model.second` change. The batches of images (B, C, *S) are repeated until `steps` are done.
    Without autocast: float16 rounds the gradients of so many pixels to 0, and the loss is not scaled here.

    Raises:
        ValueError: If the images end before `steps` are done and cannot be read again, as those of a generator.
    """
    assert model.second is not None, "only a new second head needs a warm-up"
    parameters = list(model.second.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    full_precision = torch.autocast(parameters[0].device.type, enabled=False)
    with full_precision, evaluating(model), frozen(model), trainable(model.second):
        for batch in islice(_repeated(images), steps):
            main, aux = model(batch)
            loss = F.cross_entropy(aux.float(), main.detach().float().softmax(dim=1))
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    model.warm.fill_(True)


def _repeated(images: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        is_empty = True
        for batch in images:
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError(
                "Expected batches of images that can be read again until all steps are done, but a pass over them gave "
                "none: pass a list or a loader, not a generator."
            )

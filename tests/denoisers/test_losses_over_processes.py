"""Two processes have the loss of one process on the images of both."""

from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing

from apl_lightning.denoisers import APL, CBST, CRST, IAST, DatasetDenoiser, Denoiser, MRNet, Threshold

METHODS: dict[str, Denoiser | DatasetDenoiser] = {
    "APL": APL(),
    "CBST": CBST(),
    "CRST": CRST(),
    "CRST, soft": CRST(regulariser="lrent"),
    "IAST": IAST(),
    "MRNet": MRNet(),
    "threshold": Threshold(normalise="all"),
}


def loss_and_gradients(method: str, images: slice) -> tuple[Tensor, list[Tensor]]:
    """The loss on some of three images, and its gradients at the logits; the first has few kept pixels."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(3, 4, 5, 6, generator=generator)[images].requires_grad_() for _ in range(2)]
    labels = torch.randint(4, (3, 5, 6), generator=generator)
    kept = torch.tensor([0.1, 0.6, 0.9]).view(3, 1, 1) > torch.rand(3, 5, 6, generator=generator)
    labels = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float() if method == "CRST, soft" else labels
    loss = METHODS[method].loss(*heads, labels[images], kept[images].float())
    loss.backward()
    return loss.detach(), [logits.grad for logits in heads if logits.grad is not None]


def _losses_of_rank(rank: int, folder: Path) -> None:
    """One image on rank 0, two on rank 1."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    images = slice(0, 1) if rank == 0 else slice(1, 3)
    torch.save({method: loss_and_gradients(method, images) for method in METHODS}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_losses_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """DDP averages the gradients over the processes."""
    multiprocessing.start_processes(_losses_of_rank, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for method in METHODS:
        loss, gradients = loss_and_gradients(method, slice(None))
        (loss_0, gradients_0), (loss_1, gradients_1) = first[method], second[method]
        torch.testing.assert_close((loss_0 + loss_1) / 2, loss, msg=method)
        assert len(gradients) == 2
        for whole, *parts in zip(gradients, gradients_0, gradients_1, strict=True):
            torch.testing.assert_close(torch.cat(parts) / 2, whole, msg=method)

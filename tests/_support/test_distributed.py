"""Two processes agree on the state of a module."""

from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing, nn

from apl_lightning._support.distributed import share_buffers, share_state


def content(tensor: Tensor, rank: int) -> Tensor:
    """Another value at each place, and for each shape."""
    return (torch.arange(tensor.numel()) + 10 * tensor.numel() + 100 * rank).view(tensor.shape).to(tensor.dtype)


def _share(rank: int, folder: Path) -> None:
    """Fill a module with the rank, share its buffers, then all of its state."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
    module.register_buffer("float16", torch.empty(2, 2, dtype=torch.float16))
    for tensor in module.state_dict().values():
        tensor.copy_(content(tensor, rank))
    share_buffers(module)
    torch.save(module.state_dict(), folder / f"buffers-{rank}.pt")
    share_state(module)
    torch.save(module.state_dict(), folder / f"state-{rank}.pt")
    distributed.destroy_process_group()


def test_shared_state(tmp_path: Path) -> None:
    multiprocessing.start_processes(_share, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"buffers-{rank}.pt").items():
            is_parameter = name.endswith(("weight", "bias"))
            assert torch.equal(value, content(value, rank if is_parameter else 0)), name
        for name, value in torch.load(tmp_path / f"state-{rank}.pt").items():
            assert torch.equal(value, content(value, 0)), name

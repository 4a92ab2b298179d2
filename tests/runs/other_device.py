"""A device for tests without a GPU: its tensors compute on the CPU, but do not meet those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy:0")  # a name without a backend of its own; its gradients need no further threads
_MOVES = ("aten::_to_copy", "aten::copy_")


class OnDevice(Tensor):
    """A tensor that says that it lies on `DEVICE`; its values are those of `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _compute(operation, arguments, options or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a file is read with map_location="cpu"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        memo[id(self)] = copied = OnDevice(self.inner.clone()).requires_grad_(self.requires_grad)
        copied._is_param = isinstance(self, nn.Parameter)
        return copied

    def tolist(self) -> Any:
        return self.inner.tolist()


class _Mode(TorchDispatchMode):
    """Sends operations that name `DEVICE`, such as `torch.zeros(3, device=DEVICE)`, to `_compute`."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _compute(operation, arguments, options or {})


def _compute(operation: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """The result of an operation, on its device; a `RuntimeError` for tensors of two devices, but for single values."""
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
    here = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
    name = operation._schema.name
    if here and name not in _MOVES and any(t.ndim and not isinstance(t, OnDevice) for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu in {name}.")
    onto = bool(here)
    if (device := options.get("device")) is not None:
        onto = torch.device(device).type == DEVICE.type
        options = {**options, "device": "cpu"}

    def unwrap(tensor: Tensor) -> Tensor:
        return tensor.inner if isinstance(tensor, OnDevice) else tensor

    def wrap(tensor: Tensor) -> Tensor:
        return here.get(id(tensor), OnDevice(tensor)) if onto else tensor

    result = operation(*tree_map_only(Tensor, unwrap, arguments), **tree_map_only(Tensor, unwrap, options))
    return tree_map_only(Tensor, wrap, result)


@contextmanager
def other_device() -> Iterator[None]:
    """Tensors on `DEVICE` work within the block."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(data, device=DEVICE)` is a copy from the CPU
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        assert device == DEVICE


def on_device() -> dict[str, Any]:
    """The options of a trainer that computes on `DEVICE`."""
    strategy = SingleDeviceStrategy(device=DEVICE, accelerator=_Accelerator())
    return {"accelerator": "auto", "devices": "auto", "strategy": strategy}

"""The device of an accelerator of Lightning."""

import torch


def device_of(accelerator: str) -> torch.device:
    """The device that a trainer with this accelerator computes on.

    Raises:
        ValueError: If the accelerator is unknown, or there is none.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    available = "cpu" if found is None else found.type
    device = available if accelerator == "auto" or (accelerator == "gpu" and found is not None) else accelerator
    if device not in ("cpu", available):
        raise ValueError(
            f"Expected `accelerator` to be 'auto', 'cpu' or a device of this machine, which has {available}, but got "
            f"{accelerator!r}."
        )
    return torch.device(device)

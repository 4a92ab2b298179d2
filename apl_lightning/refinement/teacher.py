"""The exponential moving average of a network."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Teacher(AveragedModel):
    r"""An exponential moving average of a network (Mean Teacher, Tarvainen and Valpola, 2017).

    After each step $\theta' \leftarrow \alpha \theta' + (1 - \alpha) \theta$, for parameters and BatchNorm statistics.
    It is a torch `AveragedModel` without gradients that is always in evaluation mode.

    Args:
        student: The network to average.
        decay: $\alpha$.

    Raises:
        ValueError: If `decay` is not in [0, 1).

    Examples:
        >>> import torch
        >>> from apl_lightning.refinement import Teacher
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> teacher = Teacher(student, decay=0.75)
        >>> _ = torch.nn.init.constant_(teacher.module.weight, 0.0), torch.nn.init.constant_(student.weight, 1.0)
        >>> teacher.update_parameters(student)
        >>> teacher.module.weight.item()
        0.25
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Expected a decay (`ema_decay`) in [0, 1), but got {decay}.")
        super().__init__(student, use_buffers=True)
        self.decay = decay
        self.requires_grad_(False)
        self._remembered: list[Tensor] = []  # sums over the weights of both networks
        self.n_averaged.fill_(1)  # the first update averages too: otherwise it copies the student
        self.eval()

    @property
    def is_copy(self) -> bool:
        """Whether no step has been averaged yet."""
        return bool(self.n_averaged == 1)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average the parameters and running statistics of the student; other buffers and integers are copied.

        That of `AveragedModel` reads the number of steps back from the GPU, twice a step, and makes NaN of a buffer
        with minus infinity, such as a mask of attention.
        """
        (averaged, copied), (current, latest) = (_averaged_and_copied(network) for network in (self.module, model))
        torch._foreach_lerp_(averaged, current, 1 - self.decay)
        for mine, theirs in zip(copied, latest, strict=True):
            mine.copy_(theirs)
        self.n_averaged += 1

    def remember(self, student: nn.Module) -> None:
        """Keep in mind both networks as they are, after a fit or from a checkpoint."""
        self._remembered = [_sums(student), _sums(self.module)]

    def is_outdated(self, student: nn.Module) -> bool:
        """Whether it is a copy, or weights were loaded into the student alone since it was remembered."""
        if self.is_copy or not self._remembered:
            return self.is_copy
        earlier, mine = self._remembered
        return torch.equal(mine, _sums(self.module)) and not torch.equal(earlier, _sums(student))

    def copy(self, student: nn.Module) -> None:
        """Copy the student's state."""
        self.module.load_state_dict(student.state_dict())
        self.n_averaged.fill_(1)


def _averaged_and_copied(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    averaged: list[Tensor] = []
    copied: list[Tensor] = []
    for parameter in network.parameters():
        (averaged if parameter.is_floating_point() else copied).append(parameter)
    for name, buffer in network.named_buffers():
        (averaged if name.endswith(("running_mean", "running_var")) else copied).append(buffer)
    return averaged, copied


def _sums(network: nn.Module) -> Tensor:
    """What changes with the weights and the BatchNorm statistics; 0 for a tensor that has NaN."""
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    return torch.stack([tensor.detach().cpu().double().sum() for tensor in tensors]).nan_to_num()

"""What comes back from a joint transform."""

from __future__ import annotations

import torch
from torch import Tensor

from apl_lightning.data.joint_transforms import transform_jointly


def test_interpolation_beyond_the_range() -> None:
    def overshoot(sample: dict[str, Tensor]) -> dict[str, Tensor]:  # as bicubic interpolation does
        return {**sample, "pseudo_label": 1.4 * sample["pseudo_label"] - 0.2, "weight": 1.4 * sample["weight"] - 0.2}

    soft = torch.tensor([[[0.0, 0.5, 1.0]], [[1.0, 0.5, 0.0]]])
    given = {"image": torch.zeros(1, 1, 3), "pseudo_label": soft, "weight": torch.tensor([[0.0, 0.5, 1.0]])}
    (moved,) = transform_jointly(overshoot, given)
    torch.testing.assert_close(moved["weight"], given["weight"])
    torch.testing.assert_close(moved["pseudo_label"], soft)

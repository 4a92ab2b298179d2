"""What a fingerprint sees of an image."""

from __future__ import annotations

import torch

from apl_lightning.data import fingerprint


def test_fingerprint_sees_all_channels() -> None:
    image = torch.rand(2, 8, 8)
    assert not torch.equal(fingerprint(image), fingerprint(torch.stack([image[0], image[1].flip(-1)])))
    torch.testing.assert_close(fingerprint(torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])), torch.full((16,), 0.5))

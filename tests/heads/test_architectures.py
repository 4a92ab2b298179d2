"""`add_dual_heads` finds the classifier of each common architecture without further arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import ARCHITECTURES, CLASSES, END, PAGE, START, routing, row
from monai.networks.nets.daf3d import DAF3D
from torch import Tensor, nn

from apl_lightning import HeadNotFoundError, add_dual_heads
from apl_lightning.heads import example_input, select_main_output

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_are_found(name: str) -> None:
    network = ARCHITECTURES[name]().eval()
    # A copy: networks of Hugging Face cannot be pickled after a forward pass. VNet takes long at 32.
    image = example_input(copy.deepcopy(network)) if name != "MONAI VNet 3D" else torch.rand(2, 1, 16, 16, 16)
    model = add_dual_heads(network, CLASSES, example=image)
    # The UperNet of Hugging Face cannot be pickled, with one head or two.
    loaded = model if name == "Hugging Face UperNet" else pickle.loads(pickle.dumps(model))

    def main_of(net: nn.Module) -> Tensor:
        with torch.no_grad():
            found = select_main_output(network, net(image), CLASSES, tuple(image.shape), None, lambda: image)
        return found.maps[found.main]

    expected = main_of(network)
    assert row(name, model) in PAGE.read_text(), "run `python tests/heads/architectures.py`"
    main, aux = model(image)
    torch.testing.assert_close(main, expected, rtol=0, atol=0)
    assert not torch.allclose(aux, expected, atol=1e-3 * expected.abs().max().item())

    for twin in (copy.deepcopy(model), loaded):
        assert torch.equal(twin(image).aux, aux)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(image).main, main_of(network), rtol=0, atol=0)

    rebuilt = ARCHITECTURES[name]().eval()
    rebuilt.load_state_dict(model.export().state_dict())
    assert torch.equal(main_of(rebuilt), expected)
    assert torch.equal(main_of(network), expected), "the original network does not change"

    routing(model, image)
    for_heads, for_encoder = model.train().routed(image)
    assert for_heads.main.shape == expected.shape, "the output in training has the shape of that in evaluation"
    sum(z.square().mean() for z in (*for_heads, *for_encoder)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters()), (
        "DDP expects a gradient for each trainable parameter"
    )


def test_page_lists_all_architectures() -> None:
    lines = PAGE.read_text().split(START)[1].split(END)[0].splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows[1:] == list(ARCHITECTURES)


def test_compiled_network_gives_the_same_logits() -> None:
    network = ARCHITECTURES["smp Unet"]().eval()
    model, image = add_dual_heads(network, CLASSES), example_input(network)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for mine, expected in zip(compiled(image), model(image), strict=True):
            torch.testing.assert_close(mine, expected)


def test_shared_predictor_is_refused() -> None:
    with pytest.raises(HeadNotFoundError, match=r"DAF3D '.*' is called \d+ times, and its results are joined"):
        add_dual_heads(DAF3D(1, CLASSES), CLASSES, example=torch.randn(2, 1, 32, 32, 32))


class Queries(nn.Module):
    """Returns queries as Mask2Former does."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 10, 3, padding=1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        masks = self.features(image)
        return {
            "class_queries_logits": masks.mean((2, 3))[..., None].expand(-1, -1, CLASSES + 1),
            "masks_queries_logits": masks,
        }


def test_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="returns queries, .* use a network with a classifier per pixel"):
        add_dual_heads(Queries(), CLASSES)

"""Compare the networks with outputs of the official code: `python tests/golden_errors.py` prints the errors."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apl_lightning.checkpoints import load

sys.path.append(str(Path(__file__).parent / "checkpoints"))

from checkpoint_files import Golden, image, write_sifa

# System, options and tolerance of each fixture. The outputs of the official code itself vary by up to 1.4e-6, and by up
# to 1e-5 after instance norms.
FIXTURES: dict[str, tuple[str, dict[str, Any], float]] = {
    "advent": ("advent", {}, 2e-5),
    "advent_256": ("advent", {}, 2e-5),
    "adaptsegnet": ("adaptsegnet", {}, 2e-5),
    "adaptsegnet_256": ("adaptsegnet", {}, 2e-5),
    "adaptsegnet_single": ("adaptsegnet", {}, 2e-5),
    "adaptsegnet_vgg": ("adaptsegnet", {}, 2e-5),
    "adaptsegnet_vgg_256": ("adaptsegnet", {}, 2e-5),
    "cycada_drn26": ("cycada", {}, 2e-5),
    "cycada_fcn8s": ("cycada", {}, 2e-5),
    "cyclegan_g1": ("cyclegan", {}, 5e-5),
    "cyclegan_g3": ("cyclegan", {}, 5e-5),
    "synseg_seg": ("synseg", {}, 5e-5),
    "synseg_fork_seg": ("synseg", {"tanh": False}, 2e-5),
    "synseg_fork_seg_ngf32": ("synseg", {"tanh": False}, 2e-5),
    "sifa_v1": ("sifa-v1", {}, 5e-5),
    "sifa_v2": ("sifa-v2", {}, 5e-5),
    "sifa_pytorch": ("sifa-pytorch", {}, 2e-5),
}


def error(ours: Tensor, official: Tensor) -> float:
    """Return the maximum absolute difference relative to the maximum absolute official value."""
    assert ours.shape == official.shape
    return ((ours - official).abs().max() / official.abs().max()).item()


def run(network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        output = network(x)
    return output if isinstance(output, tuple) else (output,)


def errors(name: str, folder: Path) -> dict[str, float]:
    """Compute the error of each official output of a fixture."""
    golden = Golden(name)
    system, options, _ = FIXTURES[name]
    if system in ("sifa-v1", "sifa-v2"):
        return sifa_errors(golden, write_sifa(folder, golden), system)
    path = folder / "model.pth"
    torch.save(golden.state_dict(), path)
    network = load(system, path, **options)
    path.unlink()
    outputs = run(network, golden.image())
    main = outputs[-1]
    # The official DeepLab returns what the classifiers do; ours upsamples that, as the official scripts do.
    low = low_logits(network, golden.image()) if system in ("advent", "adaptsegnet") else outputs
    names = ("aux", "main") if len(low) == 2 else ("main",)
    found = {key: z for key, z in zip(names, low, strict=True) if key in golden.outputs}
    if "main_up4" in golden.outputs:
        found["main_up4"] = main[:, :, ::4, ::4]
    if "main_low" in golden.outputs:
        found["main_low"] = output_of(network, "fc", golden.image())
    if "main_2" in golden.outputs:
        found["main_2"] = main[:, :, ::2, ::2]
    if "clamped" in golden.outputs:
        found["clamped"] = main.clamp(-1, 1)
    if "fake" in golden.outputs:
        torch.save(golden.state_dict("keys_g_A", "G_A:"), path)
        (found["fake"],) = run(load("cyclegan", path), golden.image())
        (found["seg_of_fake"],) = run(network, found["fake"])
    for key in ("main_argmax", "clamped_argmax"):
        if key in golden.outputs:
            assert same_labels(found[key.removesuffix("_argmax")], golden.outputs[key])
    assert {key for key in golden.outputs if not key.endswith("argmax")} == set(found)
    return {key: error(ours, golden.outputs[key]) for key, ours in found.items()}


def sifa_errors(golden: Golden, path: Path, system: str) -> dict[str, float]:
    network, generator = load(system, path), load(system, path, part="generator")
    one = golden.image()
    channels = 3 if system == "sifa-v1" else 1
    found: dict[str, Tensor] = {}
    for prefix, x in (("", one.expand(-1, channels, -1, -1)), ("three_", image((1, 3, 256, 256)))):
        if prefix and system == "sifa-v2":
            continue
        for key, logits in zip(("main", "ll"), run(network, x), strict=False):
            found |= {f"{prefix}{key}_4": logits[:, :, ::4, ::4], f"{prefix}{key}_corner": logits[:, :, 240:, 240:]}
            assert same_labels(logits, golden.outputs[f"{prefix}{key}_argmax"])
        found[f"{prefix}translated_4"] = run(generator, x)[0][:, :, ::4, ::4]
    found["main_low"] = output_of(network, "seg.model", one.expand(-1, channels, -1, -1))
    if system == "sifa-v2":
        found["ll_low"] = output_of(network, "seg_ll.model", one)
    assert {key for key in golden.outputs if not key.endswith("argmax")} == set(found)
    return {key: error(ours.permute(0, 2, 3, 1), golden.outputs[key]) for key, ours in found.items()}


def low_logits(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of the classifiers of a DeepLab."""
    return [output_of(network, name, x) for name in getattr(network, "levels", ("classifier",))]


def output_of(network: nn.Module, path: str, x: Tensor) -> Tensor:
    """Run a network and return the output of one of its submodules."""
    kept: list[Tensor] = []
    handle = network.get_submodule(path).register_forward_hook(lambda _module, _inputs, result: kept.append(result))
    run(network, x)
    handle.remove()
    return kept[0]


def same_labels(logits: Tensor, labels: Tensor) -> bool:
    return (logits.argmax(1) == labels).float().mean().item() >= 0.9999


if __name__ == "__main__":
    for fixture in FIXTURES:
        with tempfile.TemporaryDirectory() as folder:
            found = errors(fixture, Path(folder))
        print(f"{fixture}: " + ", ".join(f"{key} {value:.1e}" for key, value in found.items()))

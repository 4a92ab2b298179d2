"""Measure the cost of the label pass of each method, relative to a bare forward loop.

    python examples/benchmarks/label_pass.py

Each row runs in its own process, where the method and the bare loop alternate on the same network and images. The table
shows the median ratio of their times and the peak memory of the process. Rows of methods are complete label passes of
`PseudoLabelCallback`: reading, prediction, statistics, denoising and writing, for APL also the search for small
components. Rows of scripts reproduce how the published code of CRST, BDL, MRNet and DPL labels a data set: the same
number of forward passes per image, the same intermediate files and the same sorting.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from markdown_table import table_head, table_row
from PIL import Image
from scaling import CLASSES, PLAIN, Images, Slices, TimedLabels, forward_loop, network, peak_memory, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from apl_lightning import APLModule, TargetDataModule
from apl_lightning.denoisers import APL, BDL, CBST, CRST, DPL, IAST, UPL, Chebyshev, MRNet, Threshold

METHODS: dict[str, Callable[[], Any]] = {
    "APL": APL,
    "Threshold": Threshold,
    "BDL": BDL,
    "CBST": CBST,
    "CRST, MRKLD": CRST,
    "CRST, LRENT": lambda: CRST(regulariser="lrent"),
    "IAST": IAST,
    "MRNet": MRNet,
    "UPL": UPL,
    "DPL": DPL,
    "Chebyshev": Chebyshev,
}


def label_pass(make: Callable[[], Any], images: Images, folder: Path) -> float:
    """Seconds of one label pass of `PseudoLabelCallback`."""
    labels = TimedLabels(make(), **PLAIN)
    data = TargetDataModule(Slices(images), batch_size=2, transform=None, store_dir=folder)
    module = APLModule(network(), CLASSES, batch_norm="frozen")
    trainer(max_steps=1, callbacks=[labels], accelerator="cpu").fit(module, data)
    return labels.seconds


def crst_script(model: nn.Module, images: Images, folder: Path) -> None:
    """Two passes, float32 probabilities on disk, sorted lists of every fourth confidence per class, PNG files."""
    confidences: list[list[float]] = [[] for _ in range(CLASSES)]
    for index in range(len(images)):
        image = images[index][None]
        p = (model(image).softmax(1) + model(image.flip(-1)).softmax(1).flip(-1))[0].permute(1, 2, 0).numpy() / 2
        np.save(folder / f"{index}.npy", p)
        label, confidence = p.argmax(2), p.max(2)
        for number in range(CLASSES):
            confidences[number].extend(confidence[label == number][::4].astype(np.float32).tolist())
    thresholds = np.ones(CLASSES)
    for number, values in enumerate(confidences):
        values.sort(reverse=True)
        if rank := int(len(values) * 0.2):
            thresholds[number] = values[rank - 1]
    for index in range(len(images)):
        ratio = np.load(folder / f"{index}.npy") / thresholds
        label = ratio.argmax(2).astype(np.uint8)
        label[ratio.max(2) < 1] = 255
        Image.fromarray(label).save(folder / f"{index}.png")


def bdl_script(model: nn.Module, images: Images, folder: Path) -> None:
    """One pass, all labels and confidences in memory, one sorted array per class, PNG files."""
    labels = np.zeros((len(images), images.size, images.size))
    confidences = np.zeros_like(labels)
    for index in range(len(images)):
        p = model(images[index][None]).softmax(1)[0].permute(1, 2, 0).numpy()
        labels[index], confidences[index] = p.argmax(2), p.max(2)
    thresholds = []
    for number in range(CLASSES):
        values = np.sort(confidences[labels == number])
        thresholds.append(min(0.9, values[round(len(values) * 0.5)]) if len(values) else 0.9)
    for index in range(len(images)):
        label = labels[index].astype(np.uint8)
        for number, threshold in enumerate(thresholds):
            label[(confidences[index] < threshold) & (labels[index] == number)] = 255
        Image.fromarray(label).save(folder / f"{index}.png")


def mrnet_script(model: nn.Module, images: Images, folder: Path) -> None:
    """Four passes (two scales, each also flipped), PNG files."""
    for index in range(len(images)):
        image = images[index][None]
        small = F.interpolate(image, size=[image.shape[-1] * 4 // 5 // 32 * 32] * 2, mode="bilinear")
        views = [model(image), model(image.flip(-1)).flip(-1), model(small), model(small.flip(-1)).flip(-1)]
        p = torch.stack([F.interpolate(view, size=image.shape[2:], mode="bilinear").softmax(1) for view in views])
        Image.fromarray(p.mean(0).argmax(1)[0].to(torch.uint8).numpy()).save(folder / f"{index}.png")


def dpl_script(model: nn.Module, images: Images, folder: Path) -> None:
    """Ten passes with dropout and their features, prototypes per image, one compressed file for all images."""
    kept: list[Tensor] = []
    classifier = model.segmentation_head
    handle = classifier.register_forward_pre_hook(lambda _, inputs: (kept.append(inputs[0]), F.dropout(inputs[0]))[1:])
    found: dict[str, Any] = {}
    for index in range(len(images)):
        kept.clear()
        logits = torch.stack([model(images[index][None])[0] for _ in range(10)])
        p, deviation = logits.softmax(1).mean(0), (logits / 2).softmax(1).std(0)
        features = torch.stack([features[0] for features in kept]).mean(0).flatten(1)
        onehot = F.one_hot(p.argmax(0), CLASSES).movedim(-1, 0) * (deviation < 0.05) * p
        prototypes = onehot.flatten(1) @ features.T / onehot.flatten(1).sum(1, keepdim=True).clamp_min(1e-6)
        distances = torch.cdist(features.T, prototypes).T.view_as(p)
        found[f"label-{index}"], found[f"deviation-{index}"] = p.argmax(0).numpy(), deviation.numpy()
        found[f"prototype-{index}"] = distances.argmin(0).numpy()
    handle.remove()
    np.savez(folder / "all.npz", **found)


SCRIPTS: dict[str, Callable[[nn.Module, Images, Path], None]] = {
    "script of CRST": crst_script,
    "script of BDL": bdl_script,
    "script of MRNet": mrnet_script,
    "script of DPL": dpl_script,
}


def measure(name: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """The time relative to the bare loop, as the median over the turns, and the peak memory in MiB."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images, model = Images(arguments.images, arguments.size), network().eval()
    ratios = []
    for turn in range(arguments.turns + 1):  # the first turn is a warm-up
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            bare = forward_loop(model, images, workers=0)
            if name in METHODS:
                with torch.enable_grad():
                    seconds = label_pass(METHODS[name], images, Path(folder))
            elif name in SCRIPTS:
                start = time.perf_counter()
                SCRIPTS[name](model, images, Path(folder))
                seconds = time.perf_counter() - start
            else:
                seconds = forward_loop(model, images, workers=0)
        if turn:
            ratios.append(seconds / bare)
    return median(ratios), peak_memory()


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Run the command line and return the ratio and the peak memory of each row."""
    rows = ["bare loop", *METHODS, *SCRIPTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", choices=rows, nargs="+", default=rows)
    arguments = parser.parse_args(argv)
    print(table_head("label pass", "time over a bare forward loop", "peak memory, MiB"), flush=True)
    figures = {}
    for name in arguments.rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures[name] = pool.apply(measure, (name, arguments))
        print(table_row(name, f"{figures[name][0]:.2f}", f"{figures[name][1]:.0f}"), flush=True)
    return figures


if __name__ == "__main__":
    main()

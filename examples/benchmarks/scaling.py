"""Measure scaling, overhead and memory of the label pass and the training step.

    python examples/benchmarks/scaling.py

1. Images per second with one and with two processes of one thread each: label pass, training step and, for reference,
   plain fine-tuning with the same DDP. The measurements alternate, and the ratio is the median.
2. The label pass relative to a bare forward loop, and the training step relative to plain fine-tuning, in one process
   on the available device (in bfloat16 on a GPU).
3. The peak memory of the label pass for 100 and 1,000 images, each in its own process, and the size of the store.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.labels import predicted_at_once
from apl_lightning.losses import weighted_cross_entropy

CLASSES = 5
# Every class of an untrained network has many components: a share of 0 treats them all the same.
PLAIN: dict[str, Any] = {"guard": "off", "largest_component_share": 0.0}


class Images(Dataset[Tensor]):
    """Random images that are generated on access, so they take no memory."""

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(1, self.size, self.size, generator=torch.Generator().manual_seed(index))


class Slices(Dataset[dict[str, Any]]):
    """The same images with 50 slices per patient, so that the label pass also searches for small components."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "case": index // 50}


class TimedLabels(PseudoLabelCallback):
    """Records the seconds of the last round."""

    seconds = 0.0

    def update(self, trainer: Any, pl_module: Any) -> None:
        start = time.perf_counter()
        super().update(trainer, pl_module)
        self.seconds = time.perf_counter() - start


class TimedTraining(pl.Callback):
    """Records the seconds of the batches of the last epoch; rank 0 writes them and those of the labels to `out`."""

    def __init__(self, labels: TimedLabels | None = None, out: Path | None = None) -> None:
        self.labels = labels
        self.out = out
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if self.out is not None and trainer.is_global_zero:
            name = "plain fine-tuning step" if self.labels is None else "training step"
            labels = {} if self.labels is None else {"label pass": self.labels.seconds}
            self.out.write_text(json.dumps({**labels, name: self.seconds}))


class Plain(pl.LightningModule):
    """Plain fine-tuning on given labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, image: Tensor) -> Tensor:
        label = (image[:, 0] * CLASSES).long().clamp(max=CLASSES - 1)
        return weighted_cross_entropy(self.model(image), label, torch.ones_like(image[:, 0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def network() -> nn.Module:
    """The network of all measurements."""
    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=CLASSES)


def trainer(**options: Any) -> pl.Trainer:
    """Create a trainer without logger, checkpoints and output."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**quiet, "devices": 1, **options})


def seconds(arguments: argparse.Namespace, processes: int) -> dict[str, float]:
    """Seconds of the second label pass and epoch, and of plain fine-tuning, for a number of CPU processes."""
    # A process that has looked for a GPU cannot be forked.
    launcher = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    strategy = {} if processes == 1 else {"strategy": launcher, "devices": processes}
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, **strategy}
    images = Images(arguments.images, arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        labels = TimedLabels(**PLAIN)
        data = TargetDataModule(Slices(images), batch_size=arguments.batch_size, transform=None, store_dir=folder)
        run = trainer(callbacks=[labels, TimedTraining(labels, out)], **options)
        run.fit(APLModule(network(), CLASSES, batch_norm="adapt"), data)
        found: dict[str, float] = json.loads(out.read_text())
        loader = DataLoader(images, arguments.batch_size, shuffle=True)
        trainer(callbacks=[TimedTraining(out=out)], **options).fit(Plain(network()), loader)
        return found | json.loads(out.read_text())


def scaling(arguments: argparse.Namespace) -> dict[str, float]:
    """Throughput of two processes relative to one, as the median over the turns."""
    ratios: dict[str, list[float]] = {"label pass": [], "training step": [], "plain fine-tuning step": []}
    for turn in range(arguments.turns):
        one, two = seconds(arguments, 1), seconds(arguments, 2)
        for name, values in ratios.items():
            values.append(one[name] / two[name])
            rates = f"{arguments.images / one[name]:.1f} and {arguments.images / two[name]:.1f} images per second"
            print(f"  turn {turn}: {name}, 1 and 2 processes: {rates}, ratio {values[-1]:.2f}", flush=True)
    return {name: median(values) for name, values in ratios.items()}


def bare(arguments: argparse.Namespace) -> dict[str, float]:
    """Throughput of the label pass relative to a bare forward loop; training time relative to plain fine-tuning."""
    gpu = torch.cuda.is_available()
    images = Images(arguments.images, arguments.size)
    options: dict[str, Any] = {"accelerator": "gpu" if gpu else "cpu", "precision": "bf16-mixed" if gpu else "32-true"}
    ratios: dict[str, list[float]] = {"label pass": [], "training step": []}
    for turn in range(arguments.turns):
        plain, model = TimedTraining(), Plain(network())
        loader = DataLoader(images, arguments.batch_size, num_workers=arguments.workers, persistent_workers=False)
        trainer(max_epochs=2, callbacks=[plain], **options).fit(model, loader)
        loop = forward_loop(model.model.to("cuda" if gpu else "cpu"), images, arguments.workers)
        labels = TimedLabels(**PLAIN)
        refined = TimedTraining(labels)
        with tempfile.TemporaryDirectory() as folder:
            data = TargetDataModule(
                Slices(images),
                batch_size=arguments.batch_size,
                num_workers=arguments.workers,
                transform=None,
                store_dir=folder,
            )
            run = trainer(max_epochs=2, callbacks=[labels, refined], **options)
            run.fit(APLModule(network(), CLASSES, batch_norm="adapt"), data)
        ratios["label pass"].append(loop / labels.seconds)
        ratios["training step"].append(refined.seconds / plain.seconds)
        print(f"  turn {turn}: {', '.join(f'{name} {values[-1]:.2f}' for name, values in ratios.items())}", flush=True)
    return {name: median(values) for name, values in ratios.items()}


def forward_loop(model: nn.Module, images: Images, workers: int) -> float:
    """Seconds to predict all images with the plain network, in batches of the same size as in the label pass."""
    device = next(model.parameters()).device
    model.eval()
    at_once = predicted_at_once((images.size, images.size), device)
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for batch in DataLoader(images, at_once, num_workers=workers, pin_memory=device.type == "cuda"):
            model(batch.to(device)).float().softmax(1).max(1).indices.cpu()
    return time.perf_counter() - start


def memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB for each number of images, and bytes per pixel on disk."""
    spawn = multiprocessing.get_context("spawn")
    figures = {}
    for count in arguments.counts:
        with spawn.Pool(1) as pool:
            peak, on_disk = pool.apply(_peak_of_label_pass, (count, arguments.size))
        figures[f"peak with {count} images, MiB"] = peak
        figures["store, bytes per pixel"] = on_disk
    return figures


def _peak_of_label_pass(count: int, size: int) -> tuple[float, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = TargetDataModule(Slices(Images(count, size)), batch_size=2, store_dir=folder)
        module = APLModule(network(), CLASSES, batch_norm="frozen")
        trainer(accelerator="cpu", max_steps=1, callbacks=[PseudoLabelCallback(**PLAIN)]).fit(module, data)
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return peak_memory(), stored / (count * size**2)


def peak_memory() -> float:
    """The peak memory of this process in MiB."""
    # `getrusage` is not used because a process inherits its peak from the parent.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(peak.split()[1]) / 1024


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line and return all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=100, help="number of images, 50 a patient")
    parser.add_argument("--batch-size", type=int, default=8, help="batch size of each process")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="number of loader workers in the second part")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000], help="image counts of the third part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = {}
    for part in arguments.parts:
        print(PARTS[part].__doc__, flush=True)
        figures[part] = PARTS[part](arguments)
    for part, values in figures.items():
        print(f"{part}: {', '.join(f'{name} {value:.2f}' for name, value in values.items())}")
    return figures


PARTS = {"scaling": scaling, "bare": bare, "memory": memory}


if __name__ == "__main__":
    main()

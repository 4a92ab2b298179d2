"""The peak memory of a label pass over a volume, beside that of bare sliding-window inference.

    python examples/benchmarks/volume_memory.py

Each row is a process of its own; the memory includes Python and its packages. Two heads have twice the logits of the
plain network, so the label pass is compared with both.

By default glibc keeps freed blocks of up to 32 MB and cuts them up, so the peak of the same run differs by up to 15 %.
Here blocks from 1 MiB on go back to the system when they are freed (`MALLOC_MMAP_THRESHOLD_`), so the peak is the
memory in use. `--default-allocator` leaves that out.
"""

import argparse
import os
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytorch_lightning as pl
import torch
from markdown_table import table_head, table_row
from monai.networks.nets import UNet
from scaling import peak_memory

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule
from apl_lightning.data import sliding_window

CLASSES = 5
ROWS = ("plain network", "both heads", "label pass, guard='off'", "label pass")


class Peak(pl.Callback):
    """Keeps the peak memory of the process after the first label pass."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.value = peak_memory()
        trainer.should_stop = True


def measure(row: str, size: tuple[int, ...], patch: tuple[int, ...]) -> float:
    """The peak memory in MiB of one row, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    network = UNet(3, 1, CLASSES, channels=(8, 16, 32), strides=(2, 2), norm="batch").eval()
    image = torch.rand(1, *size)
    module = APLModule(network, CLASSES, example=torch.rand(2, 1, 32, 32, 32), batch_norm="frozen").eval()
    if row in ("plain network", "both heads"):
        with torch.no_grad():
            output = sliding_window(patch)(image[None], network if row == "plain network" else module)
            (output if row == "plain network" else output[0]).argmax(dim=1)
        return peak_memory()
    guard: Any = "off" if "off" in row else "restore"
    peak = Peak()
    with tempfile.TemporaryDirectory() as folder:
        data = TargetDataModule([image], patch_size=patch, batch_size=1, transform=None, store_dir=folder)
        options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        callbacks: list[pl.Callback] = [PseudoLabelCallback(guard=guard), peak]
        pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **options).fit(
            module, data
        )
    return peak.value


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the command line and return the peak memory of each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[192, 192, 96])
    parser.add_argument("--patch-size", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--default-allocator", action="store_true", help="measure what glibc keeps too")
    arguments = parser.parse_args(argv)
    if not arguments.default_allocator:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # read by glibc when the processes of the rows start
    peaks: dict[str, float] = {}
    print(table_head("", "peak memory, MiB", "of the plain network", "of both heads"))
    for name in ROWS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[name] = pool.submit(measure, name, tuple(arguments.size), tuple(arguments.patch_size)).result()
        of_both = f"{peaks[name] / peaks['both heads']:.2f}" if "both heads" in peaks else ""
        print(table_row(name, f"{peaks[name]:.0f}", f"{peaks[name] / peaks[ROWS[0]]:.2f}", of_both), flush=True)
    return peaks


if __name__ == "__main__":
    main()

"""A small refinement as a script for launched processes: `python launched_run.py OUT [options]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny import CLASSES, Images, TinyNet

from apl_lightning import APLModule, PseudoLabelCallback, TargetDataModule


class Record(pl.Callback):
    """Saves the final state of each rank; with `terminate_at`, rank 0 gets SIGTERM during that step."""

    def __init__(self, folder: Path, terminate_at: int | None) -> None:
        self.folder = folder
        self.terminate_at = terminate_at

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self.terminate_at == trainer.global_step + 1 and trainer.global_rank == 0:
            time.sleep(0.5)  # the other ranks now wait for the gradients of this one
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        store = trainer.train_dataloader.dataset.store
        labels = [torch.stack([store.read(i).labels.float(), store.read(i).weights]) for i in range(store.length)]
        dice = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        end = {"state": pl_module.state_dict(), "labels": torch.stack(labels), "dice": dice}
        torch.save(end, self.folder / f"end-{trainer.global_rank}.pt")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--terminate-at", type=int)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # With `{node}` in the path, each node has its own folder, as without a shared disk.
    folder = Path(str(arguments.out).format(node=os.environ.get("GROUP_RANK", 0)))
    folder.mkdir(parents=True, exist_ok=True)
    ranks = arguments.devices * arguments.nodes
    module = APLModule(TinyNet(), CLASSES, learning_rate=1e-2)
    data = TargetDataModule(
        Images(arguments.samples), Images(5, labelled=True), batch_size=4 // ranks, store_dir=folder / "labels"
    )
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=arguments.strategy,
        devices=arguments.devices,
        num_nodes=arguments.nodes,
        max_epochs=3,
        callbacks=[PseudoLabelCallback(), saving, Record(folder, arguments.terminate_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path="last", weights_only=False)


if __name__ == "__main__":
    main(sys.argv[1:])

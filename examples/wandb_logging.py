"""Log Dice, losses, pseudo-label statistics and overlays to Weights & Biases.

    python examples/wandb_logging.py

Run `wandb login` first, or set `WANDB_MODE=offline`.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
from monai.networks.nets import BasicUNet
from phantom import CLASS_NAMES, Phantoms
from pytorch_lightning.loggers import WandbLogger

from apl_lightning import APLModule, PseudoLabelCallback, PseudoLabelOverlay, TargetDataModule


def main(argv: list[str] | None = None) -> Path:
    """Run the command line and return the folder of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/wandb"))
    parser.add_argument("--patients", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)

    network = BasicUNet(2, 1, len(CLASS_NAMES), features=(8, 8, 16, 32, 64, 8))  # use a pretrained network here
    module = APLModule(network, len(CLASS_NAMES), CLASS_NAMES)
    data = TargetDataModule(train=Phantoms("ct", arguments.patients, seed=2), val=Phantoms("ct", 8, seed=3))
    logger = WandbLogger(project="apl-lightning", save_dir=arguments.out.absolute())
    callbacks = [PseudoLabelCallback(), PseudoLabelOverlay(samples=2)]
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        logger=logger,
        callbacks=callbacks,
        accelerator="cpu",
        default_root_dir=arguments.out,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    return folder


if __name__ == "__main__":
    main()

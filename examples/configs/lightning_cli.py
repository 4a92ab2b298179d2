"""The command line of Lightning, for `pytorch_lightning`; `fit` writes the refined network.

python lightning_cli.py fit --config slices.yaml
"""

import torch
from pytorch_lightning.cli import LightningCLI

from apl_lightning import APLModule, TargetDataModule

if __name__ == "__main__":
    cli = LightningCLI(APLModule, TargetDataModule)
    if cli.subcommand == "fit" and cli.trainer.is_global_zero:
        # `last.ckpt` may be older than the network that the guard chooses.
        torch.save(cli.model.export().state_dict(), "refined.pt")

"""The command line of Lightning, for `pytorch_lightning`.

python lightning_cli.py fit --config slices.yaml
"""

from pytorch_lightning.cli import LightningCLI

from apl_lightning import APLModule, TargetDataModule

if __name__ == "__main__":
    LightningCLI(APLModule, TargetDataModule)

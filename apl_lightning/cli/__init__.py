"""The command line `apl-lightning`."""

from apl_lightning.cli.main import main

"""Command line: `python -m apl_lightning.checkpoints FILE ...` identifies checkpoints."""

import argparse
import sys

from apl_lightning.checkpoints.describe import identify
from apl_lightning.checkpoints.error import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    """Print a description of each file and return the exit status, which is 1 if a file cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m apl_lightning.checkpoints",
        description="Identify checkpoints: the system, the network, its classes, and any missing or unexpected keys.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help=".pth or .safetensors file, or prefix or folder of a TensorFlow bundle"
    )
    status = 0
    for file in parser.parse_args(arguments).files:
        try:
            sys.stdout.write(identify(file) + "\n")
        except (CheckpointError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

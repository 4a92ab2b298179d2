"""`python -m apl_lightning.checkpoints FILE ...` says what checkpoints are."""

from __future__ import annotations

import argparse
import sys

from apl_lightning.checkpoints.error import CheckpointError
from apl_lightning.checkpoints.identify import identify


def main(arguments: list[str] | None = None) -> int:
    """Describe each file; returns 1 if one cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m apl_lightning.checkpoints",
        description="Say what files are: the system, the network, its classes, which keys are missing or left over.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a .pth file, or a TensorFlow bundle (prefix or folder)"
    )
    status = 0
    for file in parser.parse_args(arguments).files:
        try:
            sys.stdout.write(identify(file) + "\n")
        except (CheckpointError, FileNotFoundError) as error:
            sys.stderr.write(f"{error}\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

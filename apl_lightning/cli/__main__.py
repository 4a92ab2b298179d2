"""`python -m apl_lightning.cli` is the command line."""

import sys

from apl_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

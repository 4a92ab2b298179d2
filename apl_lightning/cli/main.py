"""Parse arguments, run a command, and report its error in one line."""

import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from apl_lightning.cli.evaluate import evaluate
from apl_lightning.cli.export import export
from apl_lightning.cli.inspect import inspect
from apl_lightning.cli.preflight import preflight
from apl_lightning.folders import predict_folder, refine_folder
from apl_lightning.nnunet import refine as refine_nnunet

COMMANDS: Any = {
    "refine": refine_folder,
    "predict": predict_folder,
    "evaluate": evaluate,
    "export": export,
    "inspect": inspect,
    "preflight": preflight,
    "nnunet": refine_nnunet,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, 1 after an error, or 2 if the arguments are wrong.

    Each command is a function, and its options are the arguments of that function. They may stand in a YAML file:
    `apl-lightning refine --config refine.yaml`. A network, a folder of images or a function is a class with its
    arguments: `--network.class_path monai.networks.nets.UNet --network.spatial_dims 2 ...`.
    """
    try:
        from jsonargparse import auto_cli
    except ImportError:
        return _fail("the command line needs jsonargparse: `pip install 'apl-lightning[cli]'`")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            given = None if arguments is None else list(arguments)
            auto_cli(COMMANDS, given, as_positional=False, prog="apl-lightning", formatter_class=_plain_help())
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0 if end.code is None else _fail(str(end.code))
        except (ValueError, TypeError, OSError, ImportError) as error:
            return _fail(str(error))
        except Exception as error:  # of Lightning, or of a class that the user has named
            return _fail(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            return _fail("interrupted")
    return 0


def _plain_help() -> Any:
    """A help formatter that leaves out the marks of references in the documentation."""
    from jsonargparse import DefaultHelpFormatter

    class PlainHelp(DefaultHelpFormatter):
        def _expand_help(self, action: Any) -> str:
            text: str = super()._expand_help(action)
            return re.sub(r"\[(`[^`]+`)\]\[[\w.]+\]", r"\1", text)

    return PlainHelp


def _fail(message: str) -> int:
    sys.stderr.write(f"apl-lightning: {' '.join(message.split())}\n")
    return 1


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line, without the source of the warning."""
    sys.stderr.write(f"{category.__name__}: {' '.join(str(message).split())}\n")

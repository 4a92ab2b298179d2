"""Parse arguments, run a command, and report its error in one line."""

import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from apl_lightning.cli.evaluate import evaluate
from apl_lightning.cli.export import export
from apl_lightning.cli.inspect import inspect
from apl_lightning.cli.nnunet import nnunet
from apl_lightning.cli.preflight import preflight
from apl_lightning.folders import predict_folder, refine_folder

COMMANDS: Any = {
    "refine": refine_folder,
    "predict": predict_folder,
    "evaluate": evaluate,
    "export": export,
    "inspect": inspect,
    "preflight": preflight,
    "nnunet": nnunet,
}


# Advice of Lightning that does not apply here, and a warning of torch about code of Lightning.
_NO_ADVICE = ("Found .* in eval mode", "You defined a `validation_step`", ".*does not have many workers", ".*LeafSpec")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, 1 after an error, or 2 if the arguments are wrong.

    Each command is a function, and its options are the arguments of that function. They may stand in a YAML file:
    `apl-lightning refine --config refine.yaml`. A network, a folder of images or a function is a class with its
    arguments: `--network.class_path monai.networks.nets.UNet --network.spatial_dims 2 ...`.
    """
    try:
        from jsonargparse import auto_cli
    except ImportError:
        return _fail("the command line needs jsonargparse: `pip install -e 'PATH/TO/apl-lightning[cli]'`")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        for advice in _NO_ADVICE:
            warnings.filterwarnings("ignore", advice)
        try:
            given = None if arguments is None else list(arguments)
            about: Any = {"prog": "apl-lightning", "version": version("apl-lightning")}
            auto_cli(COMMANDS, given, as_positional=False, parser_class=_parser(), **about)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0 if end.code is None else _fail(str(end.code))
        except (ValueError, TypeError, OSError, ImportError) as error:
            return _fail(str(error))
        except Exception as error:  # of Lightning, or of a class that the user has named
            return _fail(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            return _fail("interrupted")
    return 0


def _parser() -> Any:
    """A parser whose help leaves out references of the documentation and all subclasses of a network's class."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class PlainHelp(DefaultHelpFormatter):
        def _expand_help(self, action: Any) -> str:
            text: str = super()._expand_help(action)
            text = re.sub(r",? known subclasses: [^)]*", "", text)
            return re.sub(r"\[(`[^`]+`)\]\[[\w.]+\]", r"\1", text)

    class Parser(ArgumentParser):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, formatter_class=PlainHelp, **options)

        def error(self, message: str, ex: Exception | None = None) -> Any:
            is_text = "abc.Sequence" in message and "Given value type: <class 'str'>" in message
            is_split = re.search(r"unrecognized arguments: [^-]", message)
            hint = '\n  A list stands in brackets and quotes: "[32,32]".' if is_text or is_split else ""
            super().error(message + hint, ex)

    return Parser


def _fail(message: str) -> int:
    # jsonargparse lists why a value has none of the types of an argument; ours, which says "but", is what to do.
    reasons = re.findall(r"^\s+- (.*?)(?=^\s+- |^\s+Given value)", message, re.DOTALL | re.MULTILINE)
    if ours := [reason for reason in reasons if reason.startswith("Expected ") and ", but " in reason]:
        message = ours[0]
    sys.stderr.write(f"apl-lightning: {' '.join(message.split())}\n")
    return 1


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line, without the source of the warning."""
    sys.stderr.write(f"{category.__name__}: {' '.join(str(message).split())}\n")

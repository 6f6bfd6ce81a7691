"""The console script ``dfn``: ``dfn train`` is ``python -m dfn_fast.train``, and likewise for the other commands."""

import sys

from dfn_fast import cli
from dfn_fast.data.__main__ import main as data
from dfn_fast.evaluate.__main__ import main as evaluate
from dfn_fast.export.__main__ import main as export
from dfn_fast.predict.__main__ import main as predict
from dfn_fast.train.__main__ import main as train
from dfn_fast.version import __version__

COMMANDS = {
    "train": (train, "train a network"),
    "evaluate": (evaluate, "measure a checkpoint on a data set"),
    "predict": (predict, "segment images, videos and streams"),
    "export": (export, "write a network as an ONNX, torch.export or AOTInductor file"),
    "data": (data, "show the data sets, check yours, convert SBD"),
}


def main() -> int | None:
    """Runs the command in the first argument with the arguments after it. Returns its exit code."""
    parser = cli.Parser(
        prog="dfn",
        usage="%(prog)s COMMAND [arguments]",
        description="Discriminative Feature Network for semantic segmentation.",
        epilog="commands:\n"
        + "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`dfn COMMAND --help` shows a command's options.\n",
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--version", action="version", version=f"dfn {__version__}")
    command = parser.parse_args(sys.argv[1:2]).command
    return COMMANDS[command][0](sys.argv[2:])


def script() -> None:
    """The entry point of the console script."""
    cli.run(main)


if __name__ == "__main__":
    script()

"""`dcris completion`."""

import argparse
from typing import Any

from dcris.cli.common import adder
from dcris.utils.streams import write


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = adder(commands, "dcris ")(
        "completion",
        run,
        "print the script that completes commands and options in a shell",
        "bash",
        'To use it in this shell: eval "$(dcris completion bash)".',
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import shtab

    from dcris.cli import _parser

    write(shtab.complete(_parser(), args.shell))

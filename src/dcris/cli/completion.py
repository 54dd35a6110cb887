"""`dcris completion`: commands and options for a shell to complete."""

import argparse
from typing import Any

from dcris.cli.common import adder
from dcris.utils.streams import write


def add(commands: Any) -> None:
    """Describe the command of this file."""
    add = adder(commands, "dcris ")
    completion = add(
        "completion",
        _completion,
        "print what makes a shell complete commands and options",
        "bash",
        'To try it in this shell: eval "$(dcris completion bash)".',
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")


def _completion(args: argparse.Namespace) -> None:
    import shtab

    from dcris.cli import _parser

    write(shtab.complete(_parser(), args.shell))

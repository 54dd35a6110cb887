"""`dcris` and `python -m dcris`: one command as a process of its own."""

import gc
import sys

from dcris.cli import main


def run() -> int:
    """Run the command of this process's arguments and return its exit code."""
    code = main()
    # At the end Python looks through all objects for cycles that it could free, which takes half a
    # second once torch is imported. Frozen objects are left to the system.
    gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(run())

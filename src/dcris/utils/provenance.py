"""Where a result comes from: the command, the code, the libraries and the device."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dcris.utils.device import device_name
from dcris.version import __version__

_LIBRARIES = (
    "torch",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pycocotools",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
)
"""Those that results depend on."""

_PACKAGE = Path(__file__).parents[1]


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on besides its data, as plain JSON data.

    Returns:
        A dict of
        command: this process's command line, quoted for a shell.
        version: of dcris.
        commit: of dcris, with "+changes" if tracked files differ from it; None for an installed
            release.
        python, libraries: versions.
        device: model of the GPU, or number and model of the processor cores.
        threads: of torch on a CPU.
    """
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def commit(package: Path = _PACKAGE) -> str | None:
    """Return the commit of dcris that runs: of its checkout, or that pip installed it from; None if
    it is neither.

    Args:
        package: folder of the package.
    """
    repository = package.parents[1]
    if package.parent.name == "src" and (repository / ".git").exists():
        # A package in a virtual environment may lie in the repository of another project.
        found = _git(repository, "rev-parse", "HEAD")
        if found and re.fullmatch("[0-9a-f]{40,64}", found):
            return found + ("+changes" if _git(repository, "status", "--porcelain", "--untracked-files=no") else "")
    try:
        source = json.loads(metadata.distribution("dcris").read_text("direct_url.json") or "{}")
        return str(source["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _git(repository: Path, *words: str) -> str:
    """Return the output of a git command, "" if it fails or there is no git.

    It neither obeys variables such as GIT_DIR, which git sets for its hooks, nor writes the index.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(repository), *words],
            capture_output=True,
            encoding="utf-8",
            timeout=10,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""Environments with annotation tools, which are too large, or too old, for that of the tests.

DCRIS_TOOLS is a folder for them. The environment of a tool is made there, from PyPI, when a test
first needs it; without the variable, these tests are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = {
    "label-studio": [("label-studio==1.23.2",)],  # with label-studio-sdk 2.1.2
    "cvat": [("cvat-sdk==2.80.0", "cvat-cli==2.80.0")],
    # Without its window, which needs Qt.
    "labelme": [("labelme==6.3.1", "--no-deps"), ("numpy", "pillow", "loguru", "natsort", "scikit-image")],
    "datumaro": [("datumaro==1.13.12",)],
    "supervisely": [("supervisely==6.74.51",)],
    "fiftyone": [("fiftyone==1.22.1", "pycocotools==2.0.11")],
}
"""What pip installs, call by call, by the name of the environment."""


def environment(name: str) -> Path:
    """Return the folder of programs of a tool's environment, or skip the test."""
    root = os.environ.get("DCRIS_TOOLS")
    if not root:
        pytest.skip("DCRIS_TOOLS names no folder for the environments of annotation tools")
    made = Path(root, name)
    if not (made / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", made], check=True)
        for words in PACKAGES[name]:
            subprocess.run([made / "bin/python", "-m", "pip", "install", "--quiet", *words], check=True, timeout=1500)
        (made / "installed").touch()
    return made / "bin"


def packages(name: str) -> str:
    """Return the folder of packages of a tool's environment, for PYTHONPATH."""
    (found,) = environment(name).parent.glob("lib/python*/site-packages")
    return str(found)

"""Serve a model with dcris's web page: in a Hugging Face Space, or on this machine only."""

import os
import sys
from collections.abc import Mapping

from dcris.cli import main


def arguments(environment: Mapping[str, str]) -> list[str]:
    """Return the arguments of `dcris` for an environment. A Space has its host name in
    SPACE_HOST."""
    words = ["web", environment.get("DCRIS_MODEL", "photos"), "--port", environment.get("PORT", "7860")]
    hosts = [host.strip() for host in environment.get("SPACE_HOST", "").split(",") if host.strip()]
    if not hosts:
        return words
    words += ["--host", "0.0.0.0", "--allow-frame", "https://huggingface.co"]  # the Space's page frames this one
    for host in hosts:
        words += ["--allow-host", host]
    return words if environment.get("DCRIS_WEB_AUTH") else [*words, "--no-auth"]


if __name__ == "__main__":
    sys.exit(main(arguments(os.environ)))

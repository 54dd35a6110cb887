"""`python large_loss_scale.py ...` is `dcris ...` with a first loss scale of 2^24, with which the
first steps of float16 overflow."""

import sys
from functools import partial

import torch

from dcris.cli import main

if __name__ == "__main__":
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**24)  # type: ignore[assignment,misc]
    sys.exit(main())

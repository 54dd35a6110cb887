"""`python -m dcris` is `dcris`."""

import sys

from dcris.cli import main

sys.exit(main())

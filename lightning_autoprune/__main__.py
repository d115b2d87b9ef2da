"""``python -m lightning_autoprune`` is the command ``lightning-autoprune``."""

import sys

from lightning_autoprune.cli import main

sys.exit(main())

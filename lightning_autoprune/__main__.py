"""Run the command ``lightning-autoprune`` as ``python -m lightning_autoprune``."""

import sys

from lightning_autoprune.cli import main

sys.exit(main())

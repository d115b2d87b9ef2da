"""A real browser without a window, if one is installed: screenshots of pages, and their HTML after scripts have run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1200,2400",
)


def run(page: Path, folder: Path, *options: str) -> str:
    """Open a page with an empty profile; return what the browser prints."""
    command = [str(BROWSER), *OPTIONS, f"--user-data-dir={folder / 'profile'}", *options, page.resolve().as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=90).stdout


def screenshot(page: Path, picture: Path) -> np.ndarray:
    """Save a screenshot of a page; return it as an array of shape (height, width, 3), values 0 to 255."""
    from PIL import Image

    run(page, picture.parent, f"--screenshot={picture}")
    return np.asarray(Image.open(picture).convert("RGB"))


def has_color(seen: np.ndarray, color: str) -> bool:
    """Return True if a picture has a hundred pixels close to a color, #RRGGBB: scaling changes colors a little."""
    target = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((abs(seen.astype(int) - target) < 6).all(-1).sum() > 100)

"""Where accrete keeps what it made or fetched."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: `ACCRETE_CACHE`, or `~/.cache/accrete`."""
    return Path(os.environ.get("ACCRETE_CACHE") or Path.home() / ".cache" / "accrete").expanduser()

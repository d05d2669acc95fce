"""Where data is kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "SFPROMPT_CACHE"


def cache_dir() -> Path:
    """The folder for what was downloaded: $SFPROMPT_CACHE, or ~/.cache/sfprompt. Not created."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "sfprompt"

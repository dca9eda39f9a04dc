"""Where ``ultrazoo check`` leaves its verdict on a plugin, and ``ultrazoo plugins`` looks for it."""

from __future__ import annotations

import os
from pathlib import Path


def verdict_path(plugin: str) -> Path:
    """Return ``$XDG_CACHE_HOME/ultrazoo/checks/<plugin>.json``; its folder need not be there yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "ultrazoo" / "checks" / f"{plugin}.json"

"""Where ``ultrazoo check`` leaves its verdict on a plugin, and ``ultrazoo plugins`` looks for it."""

from __future__ import annotations

from pathlib import Path

from ultrazoo.caches import cache_home


def verdict_path(plugin: str) -> Path:
    """Return ``$XDG_CACHE_HOME/ultrazoo/checks/<plugin>.json``; its folder need not be there yet."""
    return cache_home() / "checks" / f"{plugin}.json"

"""The hooks that a plugin may implement. Each returns data; a plugin needs none of the others to offer one.

A plugin's module says which version of this interface it was written for: ``ULTRAZOO_PLUGIN_API = 1``.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

PROJECT = "ultrazoo"
PLUGIN_API = 1
"""Version of the hooks, of the records in ``ultrazoo.spec`` and of ``OpLibrary``; raised when a plugin must change."""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ultrazoo_ops() -> Iterable[OpSpec]:  # type: ignore[empty-body]
    """Operators, each in the plugin's own namespace."""


@hookspec
def ultrazoo_blocks() -> Iterable[BlockSpec]:  # type: ignore[empty-body]
    """Mixers, feed-forwards and norms."""


@hookspec
def ultrazoo_presets() -> Iterable[PresetSpec]:  # type: ignore[empty-body]
    """Named YAML configurations."""

"""The hooks that a plugin may implement. Each returns data; a plugin needs none of the others to offer one."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

PROJECT = "ultrazoo"
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

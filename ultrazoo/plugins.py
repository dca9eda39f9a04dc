"""Finds plugins by entry point, loads them lazily, and names the distribution that is at fault."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pluggy
from pydantic import BaseModel

from ultrazoo import hookspecs
from ultrazoo.hookspecs import PROJECT
from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

KINDS = ("mixer", "ffn", "norm")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One entry point of the group ``ultrazoo``: where it comes from and what it offers, or why it does not load."""

    name: str
    distribution: str
    version: str
    module: str
    blocks: tuple[BlockSpec, ...] = ()
    ops: tuple[OpSpec, ...] = ()
    presets: tuple[PresetSpec, ...] = ()
    error: str | None = None

    @property
    def origin(self) -> str:
        """Distribution and version, as error messages name it."""
        return f"{self.distribution} {self.version} (plugin {self.name!r})"


def load_plugins() -> list[Plugin]:
    """Load every installed plugin; a broken one comes back with its error and offers nothing.

    ``ULTRAZOO_DISABLE_PLUGINS`` names plugins to leave out, separated by commas, or ``all`` for all but the built-in.
    """
    disabled = {name.strip() for name in os.environ.get("ULTRAZOO_DISABLE_PLUGINS", "").split(",") if name.strip()}
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    found = sorted(importlib.metadata.entry_points(group=PROJECT), key=lambda entry: (entry.name != "core", entry.name))
    return [
        _load(manager, entry)
        for entry in found
        if entry.name == "core" or not (entry.name in disabled or "all" in disabled)
    ]


def _load(manager: pluggy.PluginManager, entry: importlib.metadata.EntryPoint) -> Plugin:
    plugin = Plugin(
        name=entry.name,
        distribution=entry.dist.name if entry.dist else "unknown",
        version=entry.dist.version if entry.dist else "unknown",
        module=entry.value,
    )
    module = None
    try:
        module = entry.load()
        manager.register(module, name=f"{plugin.distribution}:{entry.name}")
        manager.check_pending()
        return replace(
            plugin,
            ops=_offers(manager, module, "ultrazoo_ops", OpSpec),
            blocks=_offers(manager, module, "ultrazoo_blocks", BlockSpec),
            presets=_offers(manager, module, "ultrazoo_presets", PresetSpec),
        )
    except Exception as error:  # noqa: BLE001  a plugin is foreign code: whatever it raises is its fault, reported by name
        if module is not None and manager.is_registered(module):
            manager.unregister(module)
        return replace(
            plugin,
            error=f"plugin {plugin.name!r} of {plugin.distribution} {plugin.version} is left out: "
            f"{type(error).__name__}: {error}; update or uninstall {plugin.distribution}",
        )


def _offers(manager: pluggy.PluginManager, module: Any, hook: str, kind: type) -> tuple[Any, ...]:
    """Call one plugin's own implementation of a hook and check what it returns."""
    others = [other for other in manager.get_plugins() if other is not module]
    answers = manager.subset_hook_caller(hook, remove_plugins=others)()
    offered: list[Any] = []
    for answer in answers:
        if not isinstance(answer, Iterable):
            raise TypeError(f"{hook}() returned {type(answer).__name__}, expected a list of {kind.__name__}")
        offered += answer
    for item in offered:
        if not isinstance(item, kind):
            raise TypeError(f"{hook}() offered {item!r}, expected {kind.__name__}")
        if isinstance(item, BlockSpec):
            _check_block(item)
    return tuple(offered)


def _check_block(spec: BlockSpec) -> None:
    if spec.kind not in KINDS:
        raise ValueError(f"block {spec.name!r}: got kind {spec.kind!r}, expected one of {', '.join(KINDS)}")
    if not (isinstance(spec.config, type) and issubclass(spec.config, BaseModel)):
        raise TypeError(f"block {spec.name!r}: config must be a pydantic model class, got {spec.config!r}")

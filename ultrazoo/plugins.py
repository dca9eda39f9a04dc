"""Finds plugins by entry point, loads them lazily, and names the distribution that is at fault."""

from __future__ import annotations

import importlib.metadata
import os
import re
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from ultrazoo.distributions import UNKNOWN, name_and_version
from ultrazoo.hookspecs import PROJECT
from ultrazoo.offers import OutdatedError, api_of, offers_of
from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

DISABLE = "ULTRAZOO_DISABLE_PLUGINS"
CORE = ("ultrazoo", "core")
PUBLISHED = {
    "embbert": "ultrazoo-embbert",
    "embbert_embedding": "ultrazoo-embbert",
    "embbert_exact": "ultrazoo-embbert",
    "gla": "ultrazoo-gla",
    "hydra": "ultrazoo-hydra",
    "hydra_mini": "ultrazoo-hydra",
}
"""Blocks and presets that the project publishes apart -> distribution."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One entry point of the group ``ultrazoo``: where it comes from and what it offers, or why it does not load."""

    name: str
    distribution: str
    version: str
    module: str
    api: int | None = None
    """Version of the plugin interface that it states; None if it did not get so far."""
    blocks: tuple[BlockSpec, ...] = ()
    ops: tuple[OpSpec, ...] = ()
    presets: tuple[PresetSpec, ...] = ()
    reason: str | None = None
    """Why it does not load, and what to do; None if it does."""
    disabled: bool = False
    """It was not even imported, because ``ULTRAZOO_DISABLE_PLUGINS`` names it."""
    withheld: tuple[str, ...] = ()
    """Blocks and presets that it would offer, had it no error."""

    @property
    def origin(self) -> str:
        """Distribution and version, as error messages name it."""
        return f"{self.distribution} {self.version} (plugin {self.name!r})"

    def is_of(self, distribution: str) -> bool:
        """True if the plugin belongs to a distribution, however its name is spelled (PEP 503)."""
        return _normalized(distribution) == _normalized(self.distribution)

    @property
    def built_in(self) -> bool:
        """True for ultrazoo's own."""
        return (self.distribution, self.name) == CORE

    @property
    def error(self) -> str | None:
        """Why it is left out, in one line with its name and version; None if it loads, or is disabled."""
        if self.reason is None:
            return None
        return f"plugin {self.name!r} of {self.distribution} {self.version} is left out: {self.reason}"

    @property
    def absence(self) -> str:
        """Why it offers nothing, as a clause after its name; empty if it does."""
        if self.disabled:
            return f"is disabled by {DISABLE}={os.environ.get(DISABLE, '')}"
        return f"did not load: {self.reason}" if self.reason is not None else ""


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def load_plugins() -> list[Plugin]:
    """Import every installed plugin and call its hooks; a broken one comes back with its error and offers nothing.

    ``ULTRAZOO_DISABLE_PLUGINS`` names plugins or distributions that are not imported, separated by commas, or ``all``
    for all but the built-in. It is inherited by child processes, where plugins are loaded anew at first use.
    """
    found = [_describe(entry) for entry in importlib.metadata.entry_points(group=PROJECT)]
    owners: dict[str, Plugin] = {}
    loaded = []
    for plugin, entry in sorted(found, key=lambda pair: (not pair[0].built_in, pair[0].distribution, pair[0].name)):
        done = plugin if plugin.disabled or plugin.reason else _load(plugin, entry, owners)
        owners |= {_namespace(op): done for op in done.ops}
        loaded.append(done)
    return loaded


def disabled_names() -> set[str]:
    """What ``ULTRAZOO_DISABLE_PLUGINS`` names."""
    return {name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip()}


def _describe(entry: importlib.metadata.EntryPoint) -> tuple[Plugin, importlib.metadata.EntryPoint]:
    known = name_and_version(entry.dist) if entry.dist else (UNKNOWN, UNKNOWN)
    home, version = known or (entry.value.partition(":")[0].partition(".")[0], UNKNOWN)
    again = f"its installation has no METADATA; install the distribution that has the module {home} again"
    reason = None if known else again
    plugin = Plugin(name=entry.name, distribution=home, version=version, module=entry.value, reason=reason)
    named = disabled_names() & {"all", plugin.name, plugin.distribution}
    return replace(plugin, disabled=bool(named) and not plugin.built_in), entry


def _load(plugin: Plugin, entry: importlib.metadata.EntryPoint, owners: dict[str, Plugin]) -> Plugin:
    """Import a plugin and call its hooks.

    Args:
        plugin: What is known of it.
        entry: Its entry point.
        owners: Namespace of ops -> the plugin that has it already.
    """
    try:
        module = entry.load()
        plugin = replace(plugin, api=api_of(module))
        offers = offers_of(module)
        blocks, presets = offers.get("ultrazoo_blocks", ()), offers.get("ultrazoo_presets", ())
        plugin = replace(plugin, withheld=tuple(spec.name for spec in (*blocks, *presets)))
        ops = offers.get("ultrazoo_ops", ())
        _check_namespaces(plugin, ops, owners)
        return replace(plugin, ops=ops, blocks=blocks, presets=presets, withheld=())
    # foreign code: whatever it raises is its fault, reported by name; sys.exit() too, but not the user's Ctrl-C
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return replace(plugin, reason=_reason(plugin, error))


def _check_namespaces(plugin: Plugin, ops: tuple[OpSpec, ...], owners: dict[str, Plugin]) -> None:
    for op in ops:
        namespace = _namespace(op)
        owner = owners.get(namespace)
        if namespace == PROJECT and not plugin.built_in:
            raise ValueError(
                f"op {op.name!r}: the namespace {PROJECT!r} is ultrazoo's own; use another, as in my::scan"
            )
        if owner is not None and owner.distribution != plugin.distribution:
            raise ValueError(f"op {op.name!r}: the namespace {namespace!r} is that of {owner.origin}; use another")


def _namespace(op: OpSpec) -> str:
    return op.name.split("::")[0]


def _reason(plugin: Plugin, error: BaseException) -> str:
    """In one line: what is wrong with a plugin, where in its code, what to do."""
    if isinstance(error, OutdatedError):
        return f"{error}, or uninstall {plugin.distribution}"
    told = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {told}{_place(error)}; update or uninstall {plugin.distribution}"


def _place(error: BaseException) -> str:
    """Innermost line of the plugin's own code that led to an error; empty for an error of ultrazoo's checks."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    between = (Path(__file__).parent, Path(importlib.metadata.__file__).parents[1])  # ultrazoo, importlib
    theirs = [(path, line) for path, line in frames if path.is_file() and not any(map(path.is_relative_to, between))]
    if not theirs:
        return ""
    home = theirs[0][0].parent
    inside = [place for place in theirs if place[0].is_relative_to(home)] if (home / "__init__.py").exists() else theirs
    path, line = inside[-1] if inside is not theirs else theirs[0]
    return f" ({path}:{line})"

"""Name -> spec, over everything that the installed plugins offer."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from ultrazoo.errors import PluginError, UnknownNameError, did_you_mean
from ultrazoo.plugins import DISABLE, PUBLISHED, Plugin, disabled_names, load_plugins
from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

Spec = TypeVar("Spec", BlockSpec, OpSpec, PresetSpec)
FIELDS = {"mixer": "layer_pattern", "ffn": "ffn_type", "norm": "norm_type", "embedding": "embedding_type"}
log = logging.getLogger("ultrazoo")


@dataclass
class _Table(Generic[Spec]):
    """Specs of one kind with the plugins that offer each.

    A bare name means the built-in spec, if there is one; without one it is an error if several plugins offer it.
    ``distribution/name`` means the spec of that distribution.
    """

    kind: str
    offers: dict[str, list[tuple[Spec, Plugin]]] = field(default_factory=dict)

    def add(self, spec: Spec, plugin: Plugin) -> None:
        self.offers.setdefault(spec.name, []).append((spec, plugin))

    def candidates(self, name: str) -> list[tuple[Spec, Plugin]]:
        """Return what a name may mean, each spec under that name; more than one is a clash."""
        distribution, bare = split_name(name)
        offers = self.offers.get(bare, [])
        if distribution:
            return [(replace(spec, name=name), plugin) for spec, plugin in offers if plugin.is_of(distribution)]
        return [offer for offer in offers if offer[1].built_in] or offers

    def get(self, name: str, where: str) -> Spec:
        found = self.candidates(name)
        if len(found) > 1:
            raise PluginError(f"{where or self.kind}: {self.clash(name)}")
        return found[0][0]

    def clash(self, name: str) -> str:
        plugins = [plugin for _, plugin in self.candidates(name)]
        apart = sorted({f"{plugin.distribution}/{split_name(name)[1]}" for plugin in plugins})
        cure = f"write {' or '.join(apart)}" if len(apart) == len(plugins) else "uninstall one of them"
        owners = " and ".join(plugin.origin for plugin in plugins)
        return f"{self.kind} {name!r} is offered by {owners}; {cure}, or leave one out with {DISABLE}"

    def clashes(self) -> list[str]:
        return [self.clash(name) for name in self.offers if len(self.candidates(name)) > 1]

    def shadowed(self) -> list[str]:
        return [
            f"{self.kind} {name!r} of {plugin.origin} is skipped: ultrazoo has a built-in {self.kind} of that name; "
            f"write {plugin.distribution}/{name} to use it"
            for name in self.offers
            for _, plugin in self.offers[name]
            if plugin not in [owner for _, owner in self.candidates(name)]
        ]

    def all(self) -> dict[str, Spec]:
        """Return every usable spec by its shortest name: bare, or ``distribution/name`` where the bare one is taken."""
        names = set(self.offers)
        for name, offers in self.offers.items():
            if len(offers) > 1:
                names |= {f"{plugin.distribution}/{name}" for _, plugin in offers if not plugin.built_in}
        return {name: self.get(name, "") for name in sorted(names) if len(self.candidates(name)) == 1}


def split_name(name: str) -> tuple[str, str]:
    """Split ``distribution/name``; the distribution of a bare name is empty."""
    distribution, _, bare = name.rpartition("/")
    return distribution, bare


class Registry:
    """The blocks, ops and presets of all plugins.

    Args:
        plugins: As ``load_plugins`` returns them; those that do not load offer nothing, and are named where a name
            that may be theirs is asked for.
    """

    def __init__(self, plugins: list[Plugin]) -> None:
        self.plugins = plugins
        self._blocks: _Table[BlockSpec] = _Table("block")
        self._ops: _Table[OpSpec] = _Table("op")
        self._presets: _Table[PresetSpec] = _Table("preset")
        for plugin in plugins:
            for block in plugin.blocks:
                self._blocks.add(block, plugin)
            for op in plugin.ops:
                self._ops.add(op, plugin)
            for preset in plugin.presets:
                self._presets.add(preset, plugin)

    def block(self, kind: str, name: str, where: str = "") -> BlockSpec:
        """Return a block.

        Args:
            kind: ``mixer``, ``ffn`` or ``norm``.
            name: Its name in YAML, or ``distribution/name``.
            where: Start of the error message, a dotted path.

        Raises:
            UnknownNameError: No plugin offers it, or it is of another kind.
            PluginError: Two plugins offer it, and none of them is the built-in one.
        """
        known = [other for other, offers in self._blocks.offers.items() if offers[0][0].kind == kind]
        if not self._blocks.candidates(name):
            raise self._unknown(name, where or kind, known)
        spec = self._blocks.get(name, where)
        if spec.kind != kind:
            cure = f"it is for model.{FIELDS[spec.kind]}; "
            raise UnknownNameError(where or kind, name, known, cure)
        return spec

    def blocks(self, kind: str) -> dict[str, BlockSpec]:
        """Return every usable block of a kind, by name."""
        return {name: spec for name, spec in self._blocks.all().items() if spec.kind == kind}

    def mixers(self) -> dict[str, BlockSpec]:
        """Return every usable mixer, by name."""
        return self.blocks("mixer")

    def find_block(self, name: str, where: str = "") -> BlockSpec:
        """Return the block of that name, of whatever kind.

        Raises:
            UnknownNameError: No plugin offers it.
            PluginError: Two plugins offer it.
        """
        if not self._blocks.candidates(name):
            raise self._unknown(name, where or "block", self._blocks.offers)
        return self._blocks.get(name, where)

    def home_of(self, block: str) -> Plugin:
        """Return the plugin that offers a block."""
        self.find_block(block)
        return self._blocks.candidates(block)[0][1]

    def distributions_of(self, block: str) -> list[str]:
        """Return the distributions that offer a block, none for an unknown name."""
        return [plugin.distribution for _, plugin in self._blocks.candidates(block)]

    def blocks_of(self, plugin: Plugin) -> list[BlockSpec]:
        """Return a plugin's blocks, each under a name that means this block and no other."""
        named = [(spec, f"{plugin.distribution}/{spec.name}") for spec in plugin.blocks]
        return [
            spec if self._blocks.candidates(spec.name) == [(spec, plugin)] else replace(spec, name=full)
            for spec, full in named
        ]

    def op(self, name: str, where: str = "") -> OpSpec:
        """Return an op by its full name, ``namespace::name``.

        Raises:
            UnknownNameError: No plugin offers it.
        """
        if not self._ops.candidates(name):
            raise self._unknown(name, where or "op", self._ops.offers)
        return self._ops.get(name, where)

    def ops(self) -> dict[str, OpSpec]:
        """Return every usable op, by full name."""
        return self._ops.all()

    def preset(self, name: str, where: str = "") -> Path:
        """Return the path of a preset's YAML file.

        Raises:
            UnknownNameError: No plugin offers it.
            PluginError: Two plugins offer it.
        """
        if not self._presets.candidates(name):
            raise self._unknown(name, where or "preset", self._presets.offers)
        return self._presets.get(name, where).path

    def presets(self) -> dict[str, PresetSpec]:
        """Return every usable preset, by name."""
        return self._presets.all()

    def readers_of(self, field_name: str) -> list[str]:
        """Return the names of the blocks whose options include a field."""
        return sorted(name for name, spec in self._blocks.all().items() if field_name in spec.config.model_fields)

    def clashes(self) -> list[str]:
        """Return a line for each name that several plugins offer, none of them built in."""
        return [*self._blocks.clashes(), *self._ops.clashes(), *self._presets.clashes()]

    def shadowed(self) -> list[str]:
        """Return a line for each spec that is skipped because a built-in one has its name."""
        return [*self._blocks.shadowed(), *self._ops.shadowed(), *self._presets.shadowed()]

    def _unknown(self, name: str, where: str, known: Iterable[str]) -> UnknownNameError:
        """An error that also names the plugins that would offer the name, or may, if they were there."""
        distribution, bare = split_name(name)
        absent = [p for p in self.plugins if p.absence and (not distribution or p.is_of(distribution))]
        home = PUBLISHED.get(bare) if distribution in ("", PUBLISHED.get(bare)) else None
        sure = [p for p in absent if bare in p.withheld or home == p.distribution]
        if sure:
            cure = "".join(f"it is offered by {plugin.origin}, which {plugin.absence}; " for plugin in sure)
        elif home is not None:
            cure = f"it comes with a plugin: pip install {home}; "
        else:
            near = [p for p in absent if name in (p.name, p.distribution, p.distribution.removeprefix("ultrazoo-"))]
            cure = "".join(f"{plugin.origin} {plugin.absence}; " for plugin in near) or did_you_mean(name, known)
            others = ", ".join(plugin.origin for plugin in absent if plugin not in near)
            cure += f"not loaded, so not searched: {others} (see `ultrazoo plugins`); " if others else ""
        return UnknownNameError(where, name, known, cure)


_lock = threading.RLock()
_loading = False


@functools.cache
def _load() -> Registry:
    global _loading
    _loading = True
    try:
        plugins = load_plugins()
    finally:
        _loading = False
    zoo = Registry(plugins)
    for line in [*(plugin.error for plugin in plugins if plugin.error), *zoo.clashes(), *zoo.shadowed()]:
        log.warning("%s", line)
    names = {name for plugin in plugins for name in (plugin.name, plugin.distribution)} | {"all"}
    for name in sorted(disabled_names() - names):
        log.warning("%s names %r, which is no installed plugin; %s", DISABLE, name, did_you_mean(name, names))
    return zoo


def registry() -> Registry:
    """Load the installed plugins, once per process, and return what they offer; broken ones are logged by name.

    Raises:
        PluginError: A plugin asks for it while it is itself being loaded.
    """
    with _lock:
        if _loading:
            raise PluginError(
                "the registry was asked for while plugins load; ask inside a function or a block's __init__, not at "
                "import and not in a hook"
            )
        return _load()

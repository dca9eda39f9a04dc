"""Name -> spec, over everything that the installed plugins offer."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from ultrazoo.errors import PluginError, UnknownNameError
from ultrazoo.plugins import Plugin, load_plugins
from ultrazoo.spec import BlockSpec, OpSpec, PresetSpec

Spec = TypeVar("Spec", BlockSpec, OpSpec, PresetSpec)
log = logging.getLogger("ultrazoo")


@dataclass
class _Table(Generic[Spec]):
    """Specs of one kind with the plugins that offer each; a name offered twice is kept, and is an error to use."""

    kind: str
    offers: dict[str, list[tuple[Spec, Plugin]]] = field(default_factory=dict)

    def add(self, spec: Spec, plugin: Plugin) -> None:
        self.offers.setdefault(spec.name, []).append((spec, plugin))

    def get(self, name: str, where: str) -> Spec:
        offers = self.offers.get(name)
        if not offers:
            raise UnknownNameError(where or self.kind, name, self.offers)
        if len(offers) > 1:
            owners = " and ".join(plugin.origin for _, plugin in offers)
            raise PluginError(
                f"{where or self.kind}: {self.kind} {name!r} is offered by {owners}; uninstall one of them"
            )
        return offers[0][0]

    def all(self) -> dict[str, Spec]:
        return {name: offers[0][0] for name, offers in sorted(self.offers.items()) if len(offers) == 1}


class Registry:
    """The blocks, ops and presets of all plugins."""

    def __init__(self, plugins: list[Plugin]) -> None:
        self.plugins = plugins
        self._blocks: dict[str, _Table[BlockSpec]] = {kind: _Table(kind) for kind in ("mixer", "ffn", "norm")}
        self._ops: _Table[OpSpec] = _Table("op")
        self._presets: _Table[PresetSpec] = _Table("preset")
        for plugin in plugins:
            for block in plugin.blocks:
                self._blocks[block.kind].add(block, plugin)
            for op in plugin.ops:
                self._ops.add(op, plugin)
            for preset in plugin.presets:
                self._presets.add(preset, plugin)

    def block(self, kind: str, name: str, where: str = "") -> BlockSpec:
        """Return a block.

        Args:
            kind: ``mixer``, ``ffn`` or ``norm``.
            name: Its name in YAML.
            where: Start of the error message, a dotted path.

        Raises:
            UnknownNameError: No plugin offers it.
            PluginError: Two plugins offer it.
        """
        return self._blocks[kind].get(name, where)

    def blocks(self, kind: str) -> dict[str, BlockSpec]:
        """Return every usable block of a kind, by name."""
        return self._blocks[kind].all()

    def mixers(self) -> dict[str, BlockSpec]:
        """Return every usable mixer, by name."""
        return self.blocks("mixer")

    def find_block(self, name: str, where: str = "") -> BlockSpec:
        """Return the block of that name, of whatever kind.

        Raises:
            UnknownNameError: No plugin offers it.
        """
        for table in self._blocks.values():
            if name in table.offers:
                return table.get(name, where)
        raise UnknownNameError(
            where or "block", name, [name for table in self._blocks.values() for name in table.offers]
        )

    def op(self, name: str, where: str = "") -> OpSpec:
        """Return an op by its full name, ``namespace::name``.

        Raises:
            UnknownNameError: No plugin offers it.
        """
        return self._ops.get(name, where)

    def ops(self) -> dict[str, OpSpec]:
        """Return every usable op, by full name."""
        return self._ops.all()

    def preset(self, name: str, where: str = "") -> Path:
        """Return the path of a preset's YAML file.

        Raises:
            UnknownNameError: No plugin offers it.
        """
        return self._presets.get(name, where).path

    def presets(self) -> dict[str, PresetSpec]:
        """Return every usable preset, by name."""
        return self._presets.all()

    def readers_of(self, field_name: str) -> list[str]:
        """Return the names of the blocks whose options include a field."""
        tables = self._blocks.values()
        return sorted(name for t in tables for name, spec in t.all().items() if field_name in spec.config.model_fields)


@functools.cache
def registry() -> Registry:
    """Load the installed plugins, once per process, and return what they offer; broken ones are logged by name."""
    plugins = load_plugins()
    for plugin in plugins:
        if plugin.error:
            log.warning("%s", plugin.error)
    return Registry([plugin for plugin in plugins if not plugin.error])

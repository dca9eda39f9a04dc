"""The plugins that a config needs: written into every resolved config, and asked for when it is loaded again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from ultrazoo.config.model import ModelConfig
from ultrazoo.plugins import PUBLISHED
from ultrazoo.registry import FIELDS, registry

log = logging.getLogger("ultrazoo")


def plugins_of(model: ModelConfig) -> dict[str, list[str]]:
    """Distribution -> blocks of it that the model is made of, for those that are not built in."""
    found: dict[str, list[str]] = {}
    for _, name in model.blocks_used:
        home = registry().home_of(name)
        if not home.built_in:
            found.setdefault(home.distribution, []).append(name)
    return {distribution: sorted(names) for distribution, names in sorted(found.items())}


def versions() -> dict[str, str]:
    """Distribution -> version of the plugins that are loaded."""
    return {plugin.distribution: plugin.version for plugin in registry().plugins if not plugin.absence}


def missing(needs: Mapping[str, str]) -> dict[str, str]:
    """Return what is not there: distribution -> why, and what to do.

    Args:
        needs: Distribution -> version.
    """
    here, found = versions(), {}
    for distribution, version in needs.items():
        if distribution in here:
            continue
        absent = [plugin for plugin in registry().plugins if plugin.distribution == distribution]
        found[distribution] = (
            "; ".join(f"{plugin.origin} {plugin.absence}" for plugin in absent)
            if absent
            else f"version {version} is needed and none is installed; {_source(distribution)}"
        )
    return found


def _source(distribution: str) -> str:
    """Say how to get a distribution; one that ultrazoo does not publish is never recommended."""
    if distribution in PUBLISHED.values():
        return f"pip install {distribution}"
    return (
        "ultrazoo does not know this distribution, its name comes from this config alone: "
        "ask whoever wrote it, and install only what you trust"
    )


def with_distributions(data: dict[str, Any]) -> dict[str, Any]:
    """Name blocks that several plugins offer ``distribution/name``, where ``plugins`` names one of these distributions.

    A checkpoint thus keeps its block when another plugin that offers the same name is installed later.

    Args:
        data: A config as plain data, not yet validated.
    """
    plugins, model = data.get("plugins"), data.get("model")
    if not isinstance(plugins, dict) or not plugins or not isinstance(model, dict):
        return data

    def full(name: Any) -> Any:
        offering = registry().distributions_of(name) if isinstance(name, str) else []
        meant = [distribution for distribution in offering if distribution in plugins]
        return f"{meant[0]}/{name}" if len(offering) > 1 and len(meant) == 1 else name

    def layer(given: Any) -> Any:
        return {**given, "block": full(given.get("block"))} if isinstance(given, dict) else full(given)

    named = {field: full(model[field]) for field in FIELDS.values() if field in model}
    if isinstance(pattern := model.get("layer_pattern"), list):
        named["layer_pattern"] = [layer(given) for given in pattern]
    if isinstance(options := model.get("block_options"), dict):
        named["block_options"] = {full(name): own for name, own in options.items()}
    return {**data, "model": {**model, **named}}


def warn_of_others(needs: Mapping[str, str]) -> None:
    """Log a warning, once, for each plugin that is loaded in another version than was written down."""
    here = versions()
    for distribution, version in needs.items():
        if here.get(distribution, version) != version:
            _warn(distribution, version, here[distribution])


@functools.cache
def _warn(distribution: str, needed: str, here: str) -> None:
    log.warning(
        "plugins.%s: written with version %s, version %s is installed; results may differ", distribution, needed, here
    )

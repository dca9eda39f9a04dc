"""The plugins that a config needs: written into every resolved config, and asked for when it is loaded again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

from ultrazoo.config.model import ModelConfig
from ultrazoo.registry import registry

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
            else f"version {version} is needed and none is installed; pip install {distribution}"
        )
    return found


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

"""``--set a.b[1].c=value``: one value placed in nested data."""

from __future__ import annotations

import re
from typing import Any

from ultrazoo.config.yaml import parse_yaml
from ultrazoo.errors import ConfigError

STEP = re.compile(r"([^.\[\]]+)((?:\[\d+\])*)")


def apply_override(data: dict[str, Any], item: str) -> str:
    """Set one ``path=value``, such as ``training.batch_size=8`` or ``model.layer_pattern[1].d_state=8``.

    A number in brackets is a place in a list that the data has. A name there, such as a mixer's in ``layer_pattern``,
    becomes ``{block: name}`` when a value beneath it is set.

    Args:
        data: Nested data; changed.
        item: The override; its value is YAML.

    Returns:
        Dotted path of the field that changed, up to the first bracket.

    Raises:
        ConfigError: The path cannot be followed.
    """
    dotted, equals, text = item.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(STEP.fullmatch(part) for part in parts):
        raise ConfigError(f"--set {item!r}: expected path=value, for example training.batch_size=8")
    steps: list[str | int] = []
    for name, places in (STEP.fullmatch(part).groups() for part in parts):  # type: ignore[union-attr]
        steps += [name, *(int(place) for place in re.findall(r"\d+", places))]
    level: Any = data
    for depth, (step, after) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
        path = _dotted(steps[: depth + 1])
        if isinstance(step, int) and not (isinstance(level, list) and step < len(level)):
            there = f"a list of {len(level)}" if isinstance(level, list) else "no list"
            raise ConfigError(f"--set {item!r}: {path}: the config has {there} there; set the whole list instead")
        if after is None:
            level[step] = parse_yaml(text, f"--set {dotted}")
            break
        held = level[step] if isinstance(step, int) else level.get(step)
        if isinstance(step, int) and isinstance(held, str) and isinstance(after, str):
            held = {"block": held}
        elif held is None and isinstance(after, str):
            held = {}
        elif isinstance(after, str) and not isinstance(held, dict):
            raise ConfigError(f"--set {item!r}: {path} is a value, not a section")
        level[step] = held
        level = held
    return _dotted(steps).partition("[")[0]


def _dotted(steps: list[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")

"""YAML 1.2 scalars: ``3e-4`` is a number, ``on`` is not a boolean, ``010`` is ten; duplicate keys are errors.

A document is small: its bytes, the values it holds with every alias written out, their nesting and
the digits of a number are limited, so a hostile file costs little more than a valid one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ultrazoo.errors import ConfigError, shortened

LONGEST = 256 * 1024
"""Bytes of a document; a resolved config has a few thousand."""
MOST_VALUES = 5_000
"""Keys and values of a document, those behind an alias counted wherever it stands."""
DEEPEST = 32
"""Levels of nesting."""
LONGEST_NUMBER = 100
"""Characters of a number."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, no duplicate keys and bounded documents."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._values = 0
        self._measured: dict[int, tuple[int, int]] = {}  # node -> values it holds, levels below it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        before, deepest = self._values, 0
        if is_alias:
            node = super().compose_node(parent, index)
            if id(node) not in self._measured:
                raise yaml.MarkedYAMLError(problem="an alias refers to a value that holds it", problem_mark=mark)
            size, deepest = self._measured[id(node)]
        else:
            size = 1
            self._level += 1
        self._values += size
        self._require(self._values <= MOST_VALUES, f"more than {MOST_VALUES:,} values", mark)
        self._require(self._level + deepest <= DEEPEST, f"more than {DEEPEST} levels of nesting", mark)
        if not is_alias:
            node = super().compose_node(parent, index)
            self._level -= 1
            deepest = 1 + max((self._measured[id(child)][1] for child in _children(node)), default=0)
            self._measured[id(node)] = (self._values - before, deepest)
        return node

    @staticmethod
    def _require(held: bool, problem: str, mark: yaml.Mark) -> None:
        if not held:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    written = str(loader.construct_scalar(node))
    if len(written) > LONGEST_NUMBER:
        problem = f"a number of {len(written):,} characters, expected at most {LONGEST_NUMBER}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    text = written.replace("_", "")
    return int(text, 0) if text.lstrip("+-")[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader above would otherwise not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        where: Its name in error messages.

    Raises:
        ConfigError: The text is not YAML, has a tag, a duplicate key or more than one document, or holds more than a
            config can hold.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = shortened(str(error.problem))
        raise ConfigError(f"{where}{line}: {problem}; expected plain YAML (no tags, one document)") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: {shortened(str(error))}; expected plain YAML") from error


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of at most ``LONGEST`` bytes in UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: The file cannot be read, is too large, or is not what ``parse_yaml`` takes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise ConfigError(f"{path}: got more than {LONGEST:,} bytes; expected a config, which is small")
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; expected a YAML file in UTF-8") from error
    return parse_yaml(text, str(path))


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML, in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

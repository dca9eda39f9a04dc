"""Names and files of a new plugin.

The files under ``templates/`` hold ``$name``, ``$module`` and the other fields of ``Names``, and lines
``%% if mixer and not kernel`` ... ``%% end`` around what only some plugins have.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

from ultrazoo.errors import ConfigError
from ultrazoo.hookspecs import PLUGIN_API, PROJECT

TEMPLATES = Path(__file__).parent / "templates"
SUFFIX = ".tmpl"
LONGEST = 24
"""Letters of a name: with more, lines of the files grow past what linters allow."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a new plugin and its parts are called."""

    name: str
    """Of the plugin, its block, its preset and the namespace of its ops: ``my_mixer``."""
    distribution: str
    """What pip installs: ``ultrazoo-my-mixer``."""
    module: str
    """What Python imports: ``ultrazoo_my_mixer``."""
    camel: str
    """The class of its block: ``MyMixer``."""
    title: str
    """In texts: ``My mixer``."""
    folder: str
    """Of the distribution, as the user wrote it."""


def names_of(given: str, taken: Collection[str] = ()) -> Names:
    """Derive every name of a plugin from the one that the user gave.

    Args:
        given: Letters, digits and ``-``, ``_`` or ``.`` in between, as in the name of a distribution; a first
            ``ultrazoo-`` counts nothing.
        taken: Names that the plugin cannot have.

    Raises:
        ConfigError: It is no such name, or taken.
    """
    words = re.split(r"[-_.]+", given.lower())
    words = words[1:] if words[0] == PROJECT and len(words) > 1 else words
    name = "_".join(words)
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?", given.lower(), re.ASCII) or not name[0].isalpha():
        expected = "a letter, then letters and digits, with - or _ in between"
        raise ConfigError(f"new-plugin: got the name {given!r}, expected {expected}, as in my-mixer")
    if len(name) > LONGEST:
        raise ConfigError(f"new-plugin: got {len(name)} letters in {name!r}, expected at most {LONGEST}; shorten it")
    if name in taken or name == PROJECT:
        raise ConfigError(
            f"new-plugin: the name {name!r} is that of a block, a plugin or a namespace of ops that is here already; "
            f"choose another, such as {name}2"
        )
    title = " ".join(words)
    return Names(
        name=name,
        distribution=f"{PROJECT}-{'-'.join(words)}",
        module=f"{PROJECT}_{name}",
        camel="".join(word.capitalize() for word in words),
        title=title[0].upper() + title[1:],
        folder=given,
    )


def taken_names() -> set[str]:
    """Names of blocks, plugins and op namespaces that are installed, built in, published, or torch's own."""
    import torch

    from ultrazoo.plugins import PUBLISHED
    from ultrazoo.registry import registry

    taken = set(PUBLISHED)
    for plugin in registry().plugins:
        taken |= {plugin.name, *plugin.withheld}
        taken |= {block.name for block in plugin.blocks} | {preset.name for preset in plugin.presets}
    return taken | {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}


def render(names: Names, *, mixer: bool, kernel: bool) -> dict[str, str]:
    """Write the files of a distribution.

    Args:
        names: As ``names_of`` derives them.
        mixer: A block, and a preset that trains it.
        kernel: An op with a reference, a gradient and a compiled kernel; with ``mixer``, the block calls it.

    Returns:
        Path within the distribution -> text.

    Raises:
        ConfigError: Neither is wanted.
    """
    if not (mixer or kernel):
        raise ConfigError("new-plugin: got neither --mixer nor --kernel, expected one of them or both")
    places = {"module": names.module, "preset.yaml": f"{names.name}.yaml", "test_plugin.py": f"test_{names.name}.py"}
    left_out = {"block.py", "preset.yaml"} if not mixer else set[str]()
    left_out |= {"op.py", "csrc"} if not kernel else set()
    values = {**asdict(names), "api": str(PLUGIN_API)}
    files = {}
    for path in sorted(TEMPLATES.rglob(f"*{SUFFIX}")):
        parts = path.relative_to(TEMPLATES).with_suffix("").parts
        if left_out.isdisjoint(parts):
            text = _choose(path.read_text(encoding="utf-8"), {"mixer": mixer, "kernel": kernel})
            files["/".join(places.get(part, part) for part in parts)] = Template(text).substitute(values)
    return files


def _choose(text: str, has: Mapping[str, bool]) -> str:
    """Keep the lines whose condition holds."""
    kept, keep = [], True
    for line in text.splitlines(keepends=True):
        if line.startswith("%% if "):
            terms = line.removeprefix("%% if ").strip().split(" and ")
            keep = all(has[term.removeprefix("not ")] is not term.startswith("not ") for term in terms)
        elif line.startswith("%% end"):
            keep = True
        elif keep:
            kept.append(line)
    return "".join(kept)


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Put the files into a new folder.

    Raises:
        ConfigError: There is something of that name.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"new-plugin: {folder} exists already; choose another name, or another place with --output")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")

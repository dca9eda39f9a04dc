"""docs/plugins.md says what the code says: hooks, records and messages, to the letter."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_plugins import FAULTS

from ultrazoo import PLUGIN_API, hookspecs, spec

DOCUMENT = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
(SIGNATURES,) = re.findall(r"<!-- signatures.*?-->\n```python\n(.*?)```", DOCUMENT, re.DOTALL)


def declarations(source: str) -> dict[str, str]:
    """Name -> what a module declares by it: a function's signature, a class's fields with types and defaults."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else None}"
        elif isinstance(node, ast.ClassDef):
            found[node.name] = "\n".join(ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign))
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.unparse(node.value)
    return found


def test_the_signatures_are_those_of_the_code() -> None:
    documented = declarations(SIGNATURES)
    code = {**declarations(Path(str(spec.__file__)).read_text()), **declarations(Path(hookspecs.__file__).read_text())}
    names = {name for name in code if name.startswith("ultrazoo_")} | {
        "BlockSpec",
        "OpSpec",
        "PresetSpec",
        "Sample",
        "Cost",
    }
    assert documented.pop("ULTRAZOO_PLUGIN_API") == str(PLUGIN_API)
    assert documented == {name: code[name] for name in names}


def test_the_kinds_of_block_are_those_of_the_code() -> None:
    (told,) = re.findall(r"kind: BlockKind  # (.*)", SIGNATURES)
    assert tuple(re.findall(r'"(\w+)"', told)) == spec.KINDS


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_line_in_the_table(fault: str) -> None:
    words = {
        "import error": "ImportError",
        "syntax error": "SyntaxError",
        "sys.exit at import": "SystemExit",
        "library that does not load": "undefined symbol",
        "older version": "for a lower number, the plugin",
        "newer version": "written for plugin API 2, this ultrazoo offers 1",
        "no version": "does not say for which plugin API",
        "wrong signature": "are declared",
        "not a list": "expected a list of BlockSpec",
        "not a spec": "offered 'x', expected BlockSpec",
        "bare spec": "with one bare record",
        "nothing returned": "returned NoneType",
        "op of ultrazoo": "the namespace 'ultrazoo' is ultrazoo's own",
        "op without cost": "cost must be a function",
        "preset without file": "no file at",
        "exception in a hook": "any exception",
        "hook without mark": "is not marked",
        "no hook": "it implements no hook",
    }
    expected = words.get(fault, FAULTS[fault][1])
    assert expected in DOCUMENT.split("## Every error")[1], f"{fault}: {expected}"

"""Imports go one way: a module imports only what stands above it in the list of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ultrazoo"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
LAYERS = [
    ["ultrazoo.errors", "ultrazoo.output"],
    [
        "ultrazoo.spec",
        "ultrazoo.presets",
        "ultrazoo.distributions",
        "ultrazoo.options",
        "ultrazoo.arguments",
        "ultrazoo.revisions",
        "ultrazoo.callables",
    ],
    ["ultrazoo.caches", "ultrazoo.verdicts"],
    ["ultrazoo.ops"],
    ["ultrazoo.hookspecs", "ultrazoo.offers", "ultrazoo.plugins", "ultrazoo.registry", "ultrazoo"],
    ["ultrazoo.nn"],
    ["ultrazoo.blocks"],
    ["ultrazoo.core"],
    ["ultrazoo.config"],
    ["ultrazoo.model"],
    ["ultrazoo.data"],
    ["ultrazoo.train"],
    ["ultrazoo.inference", "ultrazoo.plot", "ultrazoo.export", "ultrazoo.eval"],
    ["ultrazoo.testing", "ultrazoo.bench", "ultrazoo.scaffold"],
    ["ultrazoo.cli", "ultrazoo.__main__"],
]
TOOLS = ("ultrazoo.testing", "ultrazoo.bench")


def within(module: str, package: str) -> bool:
    return module == package or (package != "ultrazoo" and module.startswith(package + "."))


def layer(module: str) -> int:
    for rank, packages in enumerate(LAYERS):
        if any(within(module, package) for package in packages):
            return rank
    raise AssertionError(f"{module} has no place in the list of import layers: give it one here and in the docs")


def imports(module: str) -> set[str]:
    """The modules of ultrazoo that ``module`` names in an import statement anywhere in its file."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            # from ultrazoo.ops import retention: the public function, though a package has the same name
            public = base == "ultrazoo.ops" and module != "ultrazoo.ops"
            names = [base if public or f"{base}.{a.name}" not in MODULES else f"{base}.{a.name}" for a in node.names]
        else:
            continue
        found.update(name for name in names if name.split(".")[0] == "ultrazoo")
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up_the_list(module: str) -> None:
    for imported in imports(module):
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which stands below it"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("ultrazoo.blocks.")])
def test_a_block_knows_neither_another_block_nor_the_registry(module: str) -> None:
    forbidden = ("ultrazoo.blocks", "ultrazoo.registry", "ultrazoo.plugins", "ultrazoo.config", "ultrazoo.hookspecs")
    own = module.split(".")[2]
    bad = {name for name in imports(module) if any(within(name, package) for package in forbidden)}
    assert not {name for name in bad if not within(name, f"ultrazoo.blocks.{own}")}


@pytest.mark.parametrize("module", [name for name in MODULES if re.match(r"ultrazoo\.ops\.\w+\.", name)])
def test_an_op_uses_no_internals_of_another(module: str) -> None:
    own = ".".join(module.split(".")[:3])
    inner = {name for name in imports(module) if re.match(r"ultrazoo\.ops\.\w+\.", name)}
    assert not {name for name in inner if not within(name, own)}


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith((*TOOLS, "ultrazoo.cli"))])
def test_the_runtime_needs_no_test_or_bench_code(module: str) -> None:
    assert not {name for name in imports(module) if name.startswith(TOOLS)}


def test_only_core_names_concrete_blocks() -> None:
    named = {name for name in MODULES if any(within(i, "ultrazoo.blocks") for i in imports(name))}
    assert {name for name in named if not name.startswith("ultrazoo.blocks")} <= {"ultrazoo.core"}


SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".cu", ".h", ".cuh"})
STABLE = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")


@pytest.mark.parametrize("source", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in SOURCES])
def test_kernels_know_torch_only_by_its_stable_headers_and_only_where_they_are_bound(source: Path) -> None:
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', source.read_text())
    torch = [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))]
    assert not [
        name for name in torch if source.stem not in ("arguments", "bind", "bind_cuda") or not name.startswith(STABLE)
    ]

"""Plugins for tests: in memory behind a made-up entry point, or as a distribution in a folder for other processes."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from torch import nn

import ultrazoo
from ultrazoo import PLUGIN_API
from ultrazoo import plugins as loader
from ultrazoo.ops.attention.op import SPECS
from ultrazoo.plugins import Plugin
from ultrazoo.spec import BlockSpec, OpSpec

SOURCE = '''
from pydantic import Field
from torch import nn

from ultrazoo import hookimpl
from ultrazoo.nn.block_config import BlockConfig
from ultrazoo.spec import BlockSpec

ULTRAZOO_PLUGIN_API = 1


class Config(BlockConfig):
    hidden_size: int
    order: int = Field(2, ge=1, description="Number of matrices.")


class Toy(nn.Module):
    """y = W ... W x, zero at padding."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.order))

    def forward(self, x, segments=None):
        for layer in self.layers:
            x = layer(x)
        return x if segments is None else x * (segments > 0)[..., None]


@hookimpl
def ultrazoo_blocks():
    spec = BlockSpec(name="toy", kind="mixer", module=Toy, config=Config, paper="none", equation="y = W x")
    return [spec]
'''
"""A plugin of one mixer, ``toy``, with the option ``order``."""


class Options(BaseModel):
    hidden_size: int


def block(name: str, **changes: Any) -> BlockSpec:
    """A mixer that does nothing."""
    values = {"kind": "mixer", "module": nn.Identity, "config": Options, "paper": "none", "equation": "y = x"}
    return BlockSpec(**{"name": name, **values, **changes})


def op(name: str, **changes: Any) -> OpSpec:
    """A whole op under another name."""
    fields = {field: getattr(SPECS[0], field) for field in ("op", "reference", "samples", "bench_samples", "cost")}
    return OpSpec(**{"name": name, **fields, **changes})


class Entry:
    """An entry point whose module is at hand; loading it raises if it is an exception."""

    group = "ultrazoo"

    def __init__(self, name: str, distribution: str, module: Any, version: str = "1.2") -> None:
        self.name, self.value, self._module = name, "a_plugin", module
        self.dist = types.SimpleNamespace(name=distribution, version=version)

    def load(self) -> Any:
        if isinstance(self._module, BaseException):
            raise self._module
        return self._module


def module_with(api: Any = PLUGIN_API, **hooks: Callable[..., Any]) -> types.ModuleType:
    """A module that states a version, None for nothing, and implements hooks."""
    module = types.ModuleType("a_plugin")
    if api is not None:
        vars(module)["ULTRAZOO_PLUGIN_API"] = api
    for name, function in hooks.items():
        setattr(module, name, ultrazoo.hookimpl(function))
    return module


def load(monkeypatch: pytest.MonkeyPatch, *entries: Entry, disable: str = "") -> dict[str, Plugin]:
    """Load the built-in plugin and these; ``distribution:name`` -> plugin."""
    core = [entry for entry in importlib.metadata.entry_points(group="ultrazoo") if entry.name == "core"]
    monkeypatch.setenv("ULTRAZOO_DISABLE_PLUGINS", disable)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", lambda group: [*entries, *core])
        return {f"{plugin.distribution}:{plugin.name}": plugin for plugin in loader.load_plugins()}


def install(
    folder: Path, name: str = "toy", version: str = "0.3", source: str = SOURCE, files: Mapping[str, str] | None = None
) -> Path:
    """Lay a distribution ``ultrazoo-<name>`` with the module ``zoo_<name>`` into a folder for ``PYTHONPATH``."""
    info = folder / f"ultrazoo_{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ultrazoo-{name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[ultrazoo]\n{name} = zoo_{name}\n")
    for path, text in {f"zoo_{name}.py": source, **(files or {})}.items():
        (folder / path).write_text(text)
    return folder


def run(*command: str | Path, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python ...`` in a fresh process that sees the plugins in a folder; nothing is disabled unless said."""
    settings = {**os.environ, "ULTRAZOO_DISABLE_PLUGINS": "", "COLUMNS": "300", "OMP_NUM_THREADS": "1", **environment}
    settings["PYTHONPATH"] = str(path or "")
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=settings)


def zoo(*arguments: str | Path, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``ultrazoo ...`` likewise."""
    return run("-m", "ultrazoo", *arguments, path=path, **environment)

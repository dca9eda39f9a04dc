"""Discovery: third parties get in by entry point, and a broken one is named and left out."""

import importlib.metadata
import types

import pytest
from pydantic import BaseModel
from torch import nn

import ultrazoo
from ultrazoo import plugins as loader
from ultrazoo.errors import PluginError, UnknownNameError
from ultrazoo.registry import Registry
from ultrazoo.spec import BlockSpec


class Options(BaseModel):
    hidden_size: int


def spec(name, **changes):
    values = {
        "name": name,
        "kind": "mixer",
        "module": nn.Identity,
        "config": Options,
        "paper": "none",
        "equation": "y = x",
    }
    return BlockSpec(**{**values, **changes})


class Distribution:
    def __init__(self, name, version="1.2"):
        self.name, self.version = name, version


class Entry:
    group = "ultrazoo"

    def __init__(self, name, dist, module, value="mod"):
        self.name, self.dist, self.value, self._module = name, Distribution(dist), value, module

    def load(self):
        if isinstance(self._module, Exception):
            raise self._module
        return self._module


def module_with(**hooks):
    module = types.ModuleType("a_plugin")
    for name, function in hooks.items():
        setattr(module, name, ultrazoo.hookimpl(function))
    return module


def load(monkeypatch, *entries):
    core = [entry for entry in importlib.metadata.entry_points(group="ultrazoo") if entry.name == "core"]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [*entries, *core])
    return {f"{plugin.distribution}:{plugin.name}": plugin for plugin in loader.load_plugins()}


def test_built_in_blocks_come_through_the_same_door(monkeypatch):
    core = load(monkeypatch)["ultrazoo:core"]
    assert core.error is None
    mixers = {block.name for block in core.blocks if block.kind == "mixer"}
    assert mixers == {"retnet", "mamba", "ode", "titan_attn", "standard_attn", "sigmoid_attn"}
    assert {op.name for op in core.ops} >= {"ultrazoo::retention", "ultrazoo::selective_scan", "ultrazoo::bitlinear"}
    assert {preset.name for preset in core.presets} >= {
        "frankenstein",
        "mini",
        "standard",
        "standard_hope",
        "tinybert",
        "embbert",
    }


def test_a_third_party_block_is_found(monkeypatch):
    good = module_with(ultrazoo_blocks=lambda: [spec("identity")])
    found = load(monkeypatch, Entry("good", "zoo-good", good))
    zoo = Registry(list(found.values()))
    assert zoo.block("mixer", "identity").module is nn.Identity
    assert "retnet" in zoo.mixers()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (ImportError("no module named left_pad"), "ImportError: no module named left_pad"),
        (module_with(ultrazoo_block=lambda: []), "unknown hook 'ultrazoo_block'"),
        (module_with(ultrazoo_blocks=lambda size: []), "size"),
        (module_with(ultrazoo_blocks=lambda: ["retnet"]), "expected BlockSpec"),
        (module_with(ultrazoo_blocks=lambda: 3), "returned int"),
        (module_with(ultrazoo_blocks=lambda: [spec("x", kind="mixxer")]), "got kind 'mixxer'"),
        (module_with(ultrazoo_blocks=lambda: [spec("x", config=dict)]), "pydantic"),
        (module_with(ultrazoo_blocks=lambda: 1 / 0), "ZeroDivisionError"),
    ],
)
def test_a_broken_plugin_is_named_and_the_rest_goes_on(monkeypatch, module, reason):
    good = module_with(ultrazoo_blocks=lambda: [spec("identity")])
    found = load(monkeypatch, Entry("bad", "zoo-bad", module), Entry("good", "zoo-good", good))
    error = found["zoo-bad:bad"].error
    assert "plugin 'bad' of zoo-bad 1.2 is left out" in error
    assert reason in error
    assert "uninstall zoo-bad" in error
    assert found["zoo-good:good"].error is None
    assert found["ultrazoo:core"].error is None


def test_same_entry_point_name_in_two_distributions_loads_both(monkeypatch):
    one, two = (module_with(ultrazoo_blocks=lambda name=name: [spec(name)]) for name in ("one", "two"))
    found = load(monkeypatch, Entry("zoo", "dist-a", one), Entry("zoo", "dist-b", two))
    assert [len(found[key].blocks) for key in ("dist-a:zoo", "dist-b:zoo")] == [1, 1]


def test_a_name_offered_twice_is_an_error_that_names_both(monkeypatch):
    again = module_with(ultrazoo_blocks=lambda: [spec("retnet")])
    zoo = Registry(list(load(monkeypatch, Entry("copy", "zoo-copy", again)).values()))
    with pytest.raises(PluginError, match=r"ultrazoo .*core.* and zoo-copy 1.2"):
        zoo.block("mixer", "retnet")
    assert "retnet" not in zoo.mixers()
    assert "mamba" in zoo.mixers()


def test_plugins_can_be_disabled_by_name_or_altogether(monkeypatch):
    entries = [Entry(name, f"zoo-{name}", module_with(ultrazoo_blocks=lambda: [])) for name in ("a", "b")]
    monkeypatch.setenv("ULTRAZOO_DISABLE_PLUGINS", "a")
    assert set(load(monkeypatch, *entries)) == {"ultrazoo:core", "zoo-b:b"}
    monkeypatch.setenv("ULTRAZOO_DISABLE_PLUGINS", "all")
    assert set(load(monkeypatch, *entries)) == {"ultrazoo:core"}


def test_unknown_block_suggests_the_nearest(monkeypatch):
    zoo = Registry(list(load(monkeypatch).values()))
    with pytest.raises(UnknownNameError, match=r"here: unknown name 'retnt'; did you mean 'retnet'\?"):
        zoo.block("mixer", "retnt", "here")

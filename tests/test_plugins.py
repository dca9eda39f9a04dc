"""Discovery: third parties get in by entry point; a broken plugin is named with its version, and the rest goes on."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest
from plugin_parts import Entry, block, load, module_with, op
from pydantic import BaseModel, ConfigDict
from torch import nn

from ultrazoo.config import ModelConfig, config_from_dict, load_config
from ultrazoo.errors import ConfigError, PluginError, UnknownNameError
from ultrazoo.registry import Registry, registry
from ultrazoo.spec import PresetSpec

Patch = pytest.MonkeyPatch
Module = types.ModuleType


class Unspeakable(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    hidden_size: int
    shape: nn.Module


class Taken(BaseModel):
    block: int = 1


def preset(path: str | Path, name: str = "p") -> PresetSpec:
    return PresetSpec(name=name, path=Path(path), summary="")


def unmarked() -> Module:
    module = module_with(ultrazoo_blocks=lambda: [])

    def ultrazoo_ops() -> list[Any]:
        return []

    vars(module)["ultrazoo_ops"] = ultrazoo_ops
    return module


def test_built_in_blocks_come_through_the_same_door(monkeypatch: Patch) -> None:
    core = load(monkeypatch)["ultrazoo:core"]
    assert core.error is None and core.built_in and core.api == 1
    mixers = {spec.name for spec in core.blocks if spec.kind == "mixer"}
    assert mixers == {"retnet", "mamba", "ode", "titan_attn", "standard_attn", "sigmoid_attn"}
    assert {spec.name for spec in core.ops} >= {
        "ultrazoo::retention",
        "ultrazoo::selective_scan",
        "ultrazoo::bitlinear",
    }
    presets = {"frankenstein", "mini", "standard", "standard_hope", "tinybert", "embbert"}
    assert {spec.name for spec in core.presets} >= presets


def test_a_third_party_block_is_found(monkeypatch: Patch) -> None:
    good = module_with(ultrazoo_blocks=lambda: [block("identity")])
    found = load(monkeypatch, Entry("good", "zoo-good", good))
    zoo = Registry(list(found.values()))
    assert zoo.block("mixer", "identity").module is nn.Identity
    assert zoo.home_of("identity").origin == "zoo-good 1.2 (plugin 'good')"
    assert "retnet" in zoo.mixers()


FAULTS = {
    "import error": (ImportError("no module named left_pad"), "ImportError: no module named left_pad"),
    "syntax error": (SyntaxError("invalid syntax"), "SyntaxError: invalid syntax"),
    "sys.exit at import": (SystemExit(3), "SystemExit: 3"),
    "library that does not load": (OSError("libx.so: undefined symbol: f"), "OSError: libx.so: undefined symbol: f"),
    "no version": (module_with(None), "add the line ULTRAZOO_PLUGIN_API = 1 to its module"),
    "newer version": (module_with(2), "written for plugin API 2, this ultrazoo offers 1; update ultrazoo"),
    "older version": (module_with(0), "written for plugin API 0, this ultrazoo offers 1; update the plugin"),
    "version that is none": (module_with("1"), "got ULTRAZOO_PLUGIN_API = '1', expected a whole number"),
    "misspelt hook": (module_with(ultrazoo_block=lambda: []), "unknown hook 'ultrazoo_block'"),
    "wrong signature": (module_with(ultrazoo_blocks=lambda size: []), "size"),
    "hook without mark": (unmarked(), "ultrazoo_ops is not marked: put @hookimpl"),
    "no hook": (module_with(), "implements no hook; expected one or more of ultrazoo_ops, ultrazoo_blocks"),
    "not a spec": (module_with(ultrazoo_blocks=lambda: ["retnet"]), "offered 'retnet', expected BlockSpec"),
    "not a list": (module_with(ultrazoo_blocks=lambda: 3), "returned int, expected a list of BlockSpec"),
    "bare spec": (module_with(ultrazoo_blocks=lambda: block("x")), "returned BlockSpec, expected a list of BlockSpec"),
    "nothing returned": (module_with(ultrazoo_ops=lambda: None), "returned NoneType, expected a list of OpSpec"),
    "no residual, no mixer": (
        module_with(ultrazoo_blocks=lambda: [block("x", kind="norm", residual=False)]),
        "got residual=False for a block of kind 'norm'",
    ),
    "unknown kind": (module_with(ultrazoo_blocks=lambda: [block("x", kind="mixxer")]), "got kind 'mixxer'"),
    "not pydantic": (module_with(ultrazoo_blocks=lambda: [block("x", config=dict)]), "must be a pydantic model class"),
    "no JSON Schema": (module_with(ultrazoo_blocks=lambda: [block("x", config=Unspeakable)]), "no JSON Schema"),
    "reserved option": (module_with(ultrazoo_blocks=lambda: [block("x", config=Taken)]), "has a field 'block'"),
    "twice by itself": (module_with(ultrazoo_blocks=lambda: [block("x"), block("x")]), "offered 'x' 2 times"),
    "ops as text": (module_with(ultrazoo_blocks=lambda: [block("x", ops="x::y")]), "ops must be full names"),
    "op of ultrazoo": (
        module_with(ultrazoo_ops=lambda: [op("ultrazoo::mine")]),
        "namespace 'ultrazoo' is ultrazoo's own",
    ),
    "op without namespace": (module_with(ultrazoo_ops=lambda: [op("mine")]), "expected a name of the form"),
    "op without cost": (module_with(ultrazoo_ops=lambda: [op("a::b", cost=None)]), "cost must be a function, got None"),
    "preset without file": (module_with(ultrazoo_presets=lambda: [preset("absent.yaml")]), "no file at absent.yaml"),
    "exception in a hook": (module_with(ultrazoo_blocks=lambda: 1 / 0), "ZeroDivisionError: division by zero (/"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_named_and_the_rest_goes_on(fault: str, monkeypatch: Patch) -> None:
    module, reason = FAULTS[fault]
    good = module_with(ultrazoo_blocks=lambda: [block("identity")])
    found = load(monkeypatch, Entry("bad", "zoo-bad", module), Entry("good", "zoo-good", good))
    bad = found["zoo-bad:bad"]
    assert bad.error is not None and "\n" not in bad.error
    assert bad.error.startswith("plugin 'bad' of zoo-bad 1.2 is left out: ")
    assert reason in bad.error
    assert "uninstall zoo-bad" in bad.error
    assert not (bad.blocks or bad.ops or bad.presets)
    assert found["zoo-good:good"].error is None
    assert found["ultrazoo:core"].error is None
    assert {"identity", "retnet"} <= set(Registry(list(found.values())).mixers())


def test_the_users_own_interrupt_is_not_swallowed(monkeypatch: Patch) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(monkeypatch, Entry("slow", "zoo-slow", KeyboardInterrupt()))


def test_a_namespace_of_ops_belongs_to_one_distribution(monkeypatch: Patch) -> None:
    entries = [
        Entry(name, dist, module_with(ultrazoo_ops=lambda name=name: [op(f"shared::{name}")]))
        for name, dist in (("one", "zoo-a"), ("two", "zoo-a"), ("three", "zoo-b"))
    ]
    found = load(monkeypatch, *entries)
    assert found["zoo-a:one"].error is None and found["zoo-a:two"].error is None
    error = str(found["zoo-b:three"].error)
    assert "op 'shared::three': the namespace 'shared' is that of zoo-a 1.2 (plugin 'two')" in error


def test_same_entry_point_name_in_two_distributions_loads_both(monkeypatch: Patch) -> None:
    one, two = (module_with(ultrazoo_blocks=lambda name=name: [block(name)]) for name in ("one", "two"))
    found = load(monkeypatch, Entry("zoo", "dist-a", one), Entry("zoo", "dist-b", two))
    assert [len(found[key].blocks) for key in ("dist-a:zoo", "dist-b:zoo")] == [1, 1]


@pytest.mark.parametrize("kind", ["mixer", "norm"])
def test_a_built_in_name_wins_and_the_plugins_block_has_its_full_name(kind: str, monkeypatch: Patch) -> None:
    again = module_with(
        ultrazoo_blocks=lambda: [block("retnet", kind=kind)], ultrazoo_presets=lambda: [preset(__file__, "mini")]
    )
    zoo = Registry(list(load(monkeypatch, Entry("copy", "Zoo_Copy", again)).values()))
    built_in = zoo.block("mixer", "retnet", "here")
    assert built_in.paper and zoo.home_of("retnet").built_in and zoo.clashes() == []
    for name in ("Zoo_Copy/retnet", "zoo-copy/retnet"):
        theirs = zoo.block(kind, name)
        assert (theirs.name, theirs.module) == (name, nn.Identity)
        assert zoo.home_of(name).distribution == "Zoo_Copy"
    assert zoo.block("mixer", "ultrazoo/retnet").module is built_in.module
    assert "Zoo_Copy/retnet" in zoo.blocks(kind) and "retnet" in zoo.mixers()
    assert zoo.preset("mini") == registry().preset("mini") and zoo.preset("zoo-copy/mini") == Path(__file__)
    lines = zoo.shadowed()
    assert len(lines) == 2 and "write Zoo_Copy/retnet to use it" in lines[0]
    assert "block 'retnet' of Zoo_Copy 1.2 (plugin 'copy') is skipped" in lines[0]
    assert [spec.name for spec in zoo.blocks_of(zoo.home_of("zoo-copy/retnet"))] == ["Zoo_Copy/retnet"]


def two_hyenas(monkeypatch: Patch) -> Registry:
    entries = [
        Entry(name, f"zoo-{name}", module_with(ultrazoo_blocks=lambda: [block("hyena")])) for name in ("one", "two")
    ]
    return Registry(list(load(monkeypatch, *entries).values()))


def test_a_name_of_two_plugins_is_an_error_that_says_what_to_write(monkeypatch: Patch) -> None:
    zoo = two_hyenas(monkeypatch)
    with pytest.raises(PluginError, match=r"here: .*zoo-one 1.2 .* and zoo-two 1.2 .*; write zoo-one/hyena or zoo-two"):
        zoo.block("mixer", "hyena", "here")
    assert {"zoo-one/hyena", "zoo-two/hyena"} <= set(zoo.mixers()) and "hyena" not in zoo.mixers()
    assert len(zoo.clashes()) == 1 and zoo.shadowed() == []
    with pytest.raises(UnknownNameError, match="unknown name 'zoo-six/hyena'"):
        zoo.block("mixer", "zoo-six/hyena")


def test_a_config_with_full_names_is_resolved_and_loads_again(monkeypatch: Patch) -> None:
    zoo = two_hyenas(monkeypatch)
    for module in ("model", "needs"):
        monkeypatch.setattr(f"ultrazoo.config.{module}.registry", lambda: zoo)
    given = {"layer_pattern": ["retnet", {"block": "zoo-two/hyena"}, "ultrazoo/retnet"]}
    config = config_from_dict({"model": given}, "here")
    assert config.plugins == {"zoo-two": "1.2"}
    assert config.model.mixer_names == ("retnet", "zoo-two/hyena", "ultrazoo/retnet")
    assert config_from_dict(config.to_dict(), "again") == config
    before = {"plugins": {"zoo-two": "1.2"}, "model": {"layer_pattern": ["hyena", "retnet"]}}  # written with one alone
    assert config_from_dict(before, "checkpoint").model.mixer_names == ("zoo-two/hyena", "retnet")
    with pytest.raises(ConfigError, match="write zoo-one/hyena or zoo-two/hyena"):
        config_from_dict({"model": {"layer_pattern": ["hyena"]}}, "here")


def test_plugins_are_disabled_by_name_by_distribution_or_altogether(monkeypatch: Patch) -> None:
    def entries() -> list[Entry]:
        return [Entry(name, f"zoo-{name}", SystemError("imported")) for name in ("a", "b")]

    def imported(disable: str) -> set[str]:
        return {name for name, plugin in load(monkeypatch, *entries(), disable=disable).items() if not plugin.disabled}

    assert imported("a") == {"ultrazoo:core", "zoo-b:b"}
    assert imported(" a , zoo-b") == imported("all") == {"ultrazoo:core"}
    impostor = Entry("core", "zoo-core", module_with())
    assert load(monkeypatch, impostor, disable="all")["zoo-core:core"].disabled


def test_unknown_block_suggests_the_nearest(monkeypatch: Patch) -> None:
    zoo = Registry(list(load(monkeypatch).values()))
    with pytest.raises(UnknownNameError, match=r"here: unknown name 'retnt'; did you mean 'retnet'\?"):
        zoo.block("mixer", "retnt", "here")
    with pytest.raises(UnknownNameError, match=r"here: unknown name 'mlp'; it is for model.ffn_type; known: mamba"):
        zoo.block("mixer", "mlp", "here")


def test_a_block_of_a_plugin_that_is_not_there_is_not_just_unknown(monkeypatch: Patch) -> None:
    half = module_with(ultrazoo_blocks=lambda: [block("hyena")], ultrazoo_ops=lambda: [op("ultrazoo::x")])
    dead = Entry("gla", "ultrazoo-gla", ImportError("no torch"), version="0.1")
    found = load(monkeypatch, dead, Entry("hy", "zoo-hy", half), Entry("off", "zoo-off", half), disable="off")
    zoo = Registry(list(found.values()))

    def said(name: str) -> str:
        monkeypatch.setattr("ultrazoo.config.model.registry", lambda: zoo)
        with pytest.raises((ConfigError, ValueError)) as caught:
            ModelConfig.model_validate({"layer_pattern": ["retnet", name]})
        return re.sub(r"\s+", " ", str(caught.value))

    place = "model.layer_pattern[1]: unknown name"
    gla = "it is offered by ultrazoo-gla 0.1 (plugin 'gla'), which did not load: ImportError: no torch"
    assert f"{place} 'gla'; {gla}" in said("gla")
    assert "is offered by zoo-hy 1.2 (plugin 'hy'), which did not load: ValueError: op 'ultrazoo::x'" in said("hyena")
    assert f"{place} 'off'; zoo-off 1.2 (plugin 'off') is disabled by ULTRAZOO_DISABLE_PLUGINS=off" in said("off")
    assert "'hydra'; it comes with a plugin: pip install ultrazoo-hydra" in said("hydra")
    with pytest.raises(UnknownNameError, match="config: unknown name 'embbert_exact'; it comes with a plugin: pip"):
        load_config("embbert_exact")
    assert "'mambo'; did you mean 'mamba'? not loaded, so not searched: ultrazoo-gla 0.1" in said("mambo")

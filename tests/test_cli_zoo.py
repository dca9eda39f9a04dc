"""``ultrazoo list``, ``show``, ``schema`` and ``plugins``: what they tell about the blocks, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_parts import call

import ultrazoo
from ultrazoo.registry import registry
from ultrazoo.spec import BlockSpec
from ultrazoo.testing.laws import LAWS, LawResult, LawViolation

Capture = pytest.CaptureFixture[str]


def test_list_names_every_block_and_preset(capsys: Capture) -> None:
    assert call("list") == 0
    table = capsys.readouterr().out
    assert call("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    names = {kind: sorted(registry().blocks(kind)) for kind in ("mixer", "ffn", "norm")}
    for kind, expected in names.items():
        assert [block["name"] for block in listed["blocks"] if block["kind"] == kind] == expected
    assert {preset["name"] for preset in listed["presets"]} == set(registry().presets())
    for entry in [*listed["blocks"], *listed["presets"]]:
        assert f"{entry['name']} " in table
    assert all(block["paper"] and block["plugin"] == "core" for block in listed["blocks"])


@pytest.mark.parametrize("kind", ["mixer", "ffn", "norm"])
def test_show_knows_every_block(kind: str, capsys: Capture) -> None:
    for name, spec in registry().blocks(kind).items():
        assert call("show", name, "--hidden-size", "48", "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["equation"] == spec.equation and facts["paper"] == spec.paper
        assert set(facts["model_fields"]) | set(facts["options"]) == set(spec.config.model_fields)
        assert all(option["help"] for option in facts["options"].values()), "an option without a description"
        assert [kernel["op"] for kernel in facts["kernels"] if kernel["device"] == "cpu"] == list(spec.ops)
        assert facts["parameters"] > 0
        assert len(facts["laws"]) == len(LAWS) - (kind != "mixer")
        assert call("show", name, "--hidden-size", "48") == 0
        assert f"{facts['parameters']:,} at hidden_size 48" in capsys.readouterr().out


def test_show_counts_at_the_width_asked_for(capsys: Capture) -> None:
    assert call("show", "standard_attn", "--hidden-size", "100", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 4 * 100 * 100 + 4 * 100


def test_show_measures_the_laws_if_asked_and_exits_3_when_one_breaks(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for law in list(LAWS)[1:]:
        monkeypatch.delitem(LAWS, law)
    assert call("show", "standard_attn", "--check", "--json") == 0
    (padding,) = json.loads(capsys.readouterr().out)["laws"]
    assert padding["held"] and 0 < padding["measured"] <= padding["limit"]

    def broken(spec: BlockSpec, options: object) -> LawResult:
        facts = {"law": "padding", "what": "change", "measured": 2.5, "limit": 1.0, "number": 1, "seconds": 0.0}
        raise LawViolation(LawResult(block=spec.name, passed=False, **facts))

    monkeypatch.setitem(LAWS, "padding", broken)
    assert call("show", "standard_attn", "--check") == 3
    assert "BROKEN: change: 2.5, limit 1" in capsys.readouterr().out


def test_an_unknown_block_is_one_block_of_text_on_stderr(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("show", "retnt") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: block: unknown name 'retnt'; did you mean 'retnet'?")
    assert "Traceback" not in err
    monkeypatch.setenv("ULTRAZOO_DEBUG", "1")
    assert call("show", "retnt") == 2
    assert "Traceback" in capsys.readouterr().err


def test_schema_knows_the_blocks_and_goes_to_a_file(capsys: Capture, tmp_path: Path) -> None:
    assert call("schema") == 0
    printed = capsys.readouterr().out
    assert call("schema", "--output", tmp_path / "schema.json") == 0
    assert (tmp_path / "schema.json").read_text() == printed
    fields = json.loads(printed)["definitions"]["ModelConfig"]["properties"]
    assert fields["layer_pattern"]["items"]["anyOf"][0]["enum"] == sorted(registry().mixers())
    assert call("schema", "--output", tmp_path / "missing" / "schema.json") == 1
    assert "missing/schema.json" in capsys.readouterr().err


def test_plugins_lists_the_built_in_one(capsys: Capture) -> None:
    assert call("plugins", "--json") == 0
    core = next(plugin for plugin in json.loads(capsys.readouterr().out) if plugin["name"] == "core")
    assert core["error"] is None and "retnet" in core["blocks"] and "embbert" in core["presets"]
    assert call("plugins") == 0
    assert f"core  ultrazoo      {ultrazoo.__version__}" in capsys.readouterr().out

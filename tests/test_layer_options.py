"""Options of single layers, ``{block: mamba, d_state: 8}`` in ``layer_pattern``: checked, resolved, shown, kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_parts import call

from ultrazoo.config import Config, ModelConfig, config_from_dict, json_schema, load_config
from ultrazoo.config.yaml import parse_yaml
from ultrazoo.errors import ConfigError
from ultrazoo.model import build_model, parameter_table

SMALL = {"hidden_size": 32, "num_heads": 4, "retention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 100}
PATTERN = ["retnet", {"block": "mamba", "d_state": 8}, "mamba"]


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, "num_layers": 6, "layer_pattern": PATTERN, **changes})


def test_a_layer_has_its_own_options_and_the_others_those_of_the_block() -> None:
    built = build_model(model(block_options={"mamba": {"d_state": 4, "expand": 1}}))
    shapes = [tuple(parameter.shape) for name, parameter in built.named_parameters() if name.endswith("ahead.A_log")]
    assert shapes == [(32, 8), (32, 4), (32, 8), (32, 4)]  # (expand hidden_size, d_state)


def test_the_parameter_table_tells_the_layers_apart() -> None:
    built = build_model(model())
    table = dict(parameter_table(built))
    assert {"mixer retnet (x 2)", "mixer mamba d_state=8 (x 2)", "mixer mamba (x 2)"} <= set(table)
    assert table["mixer mamba d_state=8 (x 2)"] < table["mixer mamba (x 2)"]
    assert sum(table.values()) == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("{block: mamba, d_stat: 8}", "layer_pattern[1].d_stat: unknown field; did you mean 'd_state'? known: d_conv"),
        ("{block: mamba, d_state: x}", "layer_pattern[1].d_state: got 'x'; expected a valid integer"),
        ("{block: mamba, d_state: 0}", "layer_pattern[1].d_state: got 0; expected greater than 0"),
        ("{block: mamba, hidden_size: 8}", "layer_pattern[1].hidden_size: set it as model.hidden_size"),
        ("{block: mamba, ode_steps: 8}", "layer_pattern[1].ode_steps: set it as model.ode_steps"),
        ("{block: mamb, d_state: 8}", "layer_pattern[1]: unknown name 'mamb'; did you mean 'mamba'?"),
        ("{block: mlp}", "layer_pattern[1]: unknown name 'mlp'; it is for model.ffn_type"),
        ("{d_state: 8}", "layer_pattern[1]: got {'d_state': 8} without 'block', expected a mixer's name"),
        ("{block: [mamba]}", "layer_pattern[1]: got the name ['mamba'], expected a mixer's name"),
        ("3", "layer_pattern[1]: got 3, expected a mixer's name, or its name with options, as in {block: mamba"),
    ],
)
def test_an_error_names_the_layer_and_the_option(layer: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"model: {{hidden_size: 32, num_heads: 4, layer_pattern: [standard_attn, {layer}]}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"model.{message}" in str(caught.value)
    assert "1 problem(s)" in str(caught.value)


def test_a_bad_option_of_the_block_is_not_blamed_on_the_layer() -> None:
    with pytest.raises(ValueError, match=r"model\.block_options\.mamba\.d_conv: got 0"):
        model(block_options={"mamba": {"d_conv": 0}})


def test_an_option_that_every_layer_sets_itself_is_told() -> None:
    given = {"model": {**SMALL, "layer_pattern": [PATTERN[1]], "block_options": {"mamba": {"d_state": 4}}}}
    (notice,) = config_from_dict(given, "here").model.notices()[-1:]
    assert notice.startswith("model.block_options.mamba.d_state: has no effect")


def test_the_resolved_config_goes_round(tmp_path: Path) -> None:
    first = Config(model=model())
    assert first.model.layer_pattern[0] == "retnet"
    assert first.to_dict()["model"]["layer_pattern"] == PATTERN
    path = tmp_path / "resolved.yaml"
    path.write_text(first.to_yaml())
    assert load_config(path).config == first
    assert config_from_dict(json.loads(json.dumps(first.to_dict())), "checkpoint") == first
    assert model(layer_pattern=[{"block": "retnet"}]) == model(layer_pattern=["retnet"])


def test_overrides_reach_the_layers_and_print_config_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    sets = [
        "model.layer_pattern=[retnet, {block: mamba, d_state: 8}, mamba]",
        "model.layer_pattern[2].expand=1",
        "model.retention_heads=4",
    ]
    assert call("train", "embbert", "--print-config", *(word for item in sets for word in ("--set", item))) == 0
    printed = capsys.readouterr().out
    expected = ["retnet", {"block": "mamba", "d_state": 8}, {"block": "mamba", "expand": 1}]
    assert parse_yaml(printed, "printed")["model"]["layer_pattern"] == expected
    (line,) = [line for line in printed.splitlines() if "layer_pattern" in line]
    assert line.endswith("# command line")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("model.layer_pattern[9].d_state=8", "model.layer_pattern[9]: the config has a list of 1 there"),
        ("model.layer_pattern.d_state=8", "model.layer_pattern is a value, not a section"),
        ("model.dropout[0]=1", "model.dropout[0]: the config has no list there"),
        ("model.layer_pattern[x]=1", "expected path=value"),
    ],
)
def test_an_override_that_leads_nowhere_says_where_it_ends(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("embbert", [item])


def test_the_schema_takes_names_and_names_with_options() -> None:
    names, *uses = json_schema()["definitions"]["ModelConfig"]["properties"]["layer_pattern"]["items"]["anyOf"]
    mamba = next(use for use in uses if use["properties"]["block"]["const"] == "mamba")
    assert mamba["properties"]["d_state"]["exclusiveMinimum"] == 0
    assert mamba["required"] == ["block"] and mamba["additionalProperties"] is False
    assert "hidden_size" not in mamba["properties"]
    assert names["enum"] == [use["properties"]["block"]["const"] for use in uses]

"""The config: names, errors, overrides and origins."""

import json

import pytest
from config_parts import SMALL, write

from ultrazoo.config import Config, ModelConfig, block_config, config_from_dict, json_schema, load_config
from ultrazoo.errors import ConfigError, UnknownNameError
from ultrazoo.registry import registry


def problems(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "text", [SMALL, "# a comment\n" + SMALL, "---\n" + SMALL, '"model_class": frankenstein\n' + SMALL]
)
def test_a_byte_order_mark_at_the_start_is_skipped(tmp_path, text):
    expected = load_config(write(tmp_path, text)).config
    assert load_config(write(tmp_path, "\ufeff" + text)).config == expected


def test_every_problem_of_a_file_is_shown_at_once(tmp_path):
    text = (
        "model:\n  num_headz: 4\n  hidden_size: wide\n  dropout: 1.5\ntraining:\n  batch_size: 0\n  learning_rat: 1\n"
    )
    message = problems(tmp_path, text)
    assert "5 problem(s)" in message
    assert "model.num_headz: unknown field; did you mean 'num_heads'?" in message
    assert (
        "model.hidden_size: got 'wide'; expected a valid integer" in message
        or "model.hidden_size: got 'wide'" in message
    )
    assert "model.dropout: got 1.5" in message
    assert "training.batch_size: got 0" in message
    assert "training.learning_rat: unknown field; did you mean 'learning_rate'?" in message


def test_unknown_section_is_named(tmp_path):
    assert "trainin: unknown field; did you mean 'training'?" in problems(tmp_path, "trainin: {}\n")


def test_unknown_block_names_its_place_and_the_nearest(tmp_path):
    message = problems(tmp_path, "model: {layer_pattern: [standard_attn, retnt]}\n")
    assert "model.layer_pattern[1]: unknown name 'retnt'; did you mean 'retnet'?" in message
    assert "known: " in message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("use_moe: true, num_experts: 2, top_k_experts: 3", "top_k_experts"),
        ("hidden_size: 100, num_heads: 12", "num_heads"),
        ("hidden_size: 96, retention_heads: 5, layer_pattern: [retnet]", "retention_heads"),
        ("use_factorized_embedding: true, factorized_embedding_dim: 768", "model.factorized_embedding_dim: got 768"),
        (
            "layer_pattern: [mamba], block_options: {mamba: {d_stat: 8}}",
            "mamba.d_stat: unknown field; did you mean 'd_state'?",
        ),
        ("layer_pattern: [mamba], block_options: {mamba: {hidden_size: 8}}", "set it as model.hidden_size"),
        (
            "block_options: {mambo: {d_state: 8}}",
            "model.block_options.mambo: unknown name 'mambo'; did you mean 'mamba'?",
        ),
        ("use_moe: true, ffn_type: moe", "model.ffn_type: got 'moe' with use_moe true"),
        ("norm_type: batch_norm", "model.norm_type: unknown name 'batch_norm'"),
        ("layer_pattern: []", "model.layer_pattern: got []"),
        ("norm_eps: .nan", "model.norm_eps"),
        ("dropout: .inf", "model.dropout"),
    ],
)
def test_a_contradiction_or_a_value_out_of_range_is_an_error(tmp_path, model, message):
    assert message in problems(tmp_path, f"model: {{{model}}}\n")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("training.learning_rate", ".inf", "got inf; expected a finite number"),
        ("training.adam_epsilon", ".nan", "got nan"),
        ("training.num_epochs", ".inf", "got inf; expected a finite number"),
        ("training.num_epochs", "1e300", "got 1e+300; expected less than or equal to 1000000000"),
        ("model.initializer_range", ".inf", "got inf; expected a finite number"),
        ("training.seed", str(2**64), f"got {2**64}; expected less than or equal to {2**63 - 1}"),
        ("training.max_samples", str(2**63), f"got {2**63}; expected less than or equal to {2**63 - 1}"),
        ("training.dataset_batch_size", str(2**63), f"got {2**63}, expected at most {2**31 - 1}; leave the field out"),
        ("model.hidden_size", str(2**31), f"got {2**31}, expected at most {2**31 - 1}; leave the field out"),
        ("model.block_options.mamba.d_state", str(2**31), f"got {2**31}, expected at most {2**31 - 1}"),
        ("model.layer_pattern[0].d_state", str(10**30), f"got {10**30}, expected at most {2**31 - 1}"),
        ("model.layer_pattern[0].dt_max", ".inf", "got inf; expected a finite number"),
    ],
)
def test_a_number_that_nothing_can_use_is_an_error(tmp_path, field, value, message):
    assert f"{field}: {message}" in problems(tmp_path, "model: {layer_pattern: [mamba]}\n", f"{field}={value}")


def test_seeds_and_row_limits_may_use_63_bits():
    config = config_from_dict({"training": {"seed": 2**63 - 1, "max_samples": 2**40}}, "test")
    assert config_from_dict(config.to_dict(), "again") == config


@pytest.mark.parametrize("field", ["local_parquet_dir", "tokenizer", "cache_dir", "output_dir"])
@pytest.mark.parametrize("value", ["", "  ", "a\0b"])
def test_a_path_is_not_blank(tmp_path, field, value):
    message = problems(tmp_path, "", f"training.{field}={json.dumps(value)}")
    assert f"training.{field}: got {value!r}, expected a path; leave the field out for " in message


def test_mini_always_factorises(tmp_path):
    assert load_config(write(tmp_path, "model_class: mini\n")).config.model.use_factorized_embedding
    loaded = load_config(write(tmp_path, "model_class: mini\nmodel: {use_factorized_embedding: false}\n"))
    assert loaded.config.model.use_factorized_embedding
    assert "model.use_factorized_embedding: false has no effect: model_class mini" in "\n".join(loaded.notices)


def test_positions_default_to_rope_unless_hope_serves_every_layer():
    small = {"hidden_size": 32, "num_heads": 4}
    assert ModelConfig(**small).position_embedding == "rope"
    assert ModelConfig(**small, layer_pattern=["titan_attn"], use_hope=True).position_embedding == "none"
    scans = Config(model=ModelConfig(**small, retention_heads=4, layer_pattern=["retnet", "mamba"]))
    assert scans.model.position_embedding == "none"
    assert config_from_dict(scans.to_dict(), "its own resolved form").model == scans.model
    assert (
        ModelConfig(**small, layer_pattern=["titan_attn", "standard_attn"], use_hope=True).position_embedding == "rope"
    )
    assert ModelConfig(**small, position_embedding="none").position_embedding == "none"


def test_overrides_win_and_origins_are_told(tmp_path):
    loaded = load_config(
        write(tmp_path, SMALL + "training: {seed: 3}\n"),
        [
            "training.batch_size=8",
            "training.learning_rate=3e-4",
            "model.layer_pattern=[mamba, retnet]",
            "model.retention_heads=2",
        ],
    )
    config = loaded.config
    assert (config.training.batch_size, config.training.learning_rate) == (8, 3e-4)
    assert config.model.layer_pattern == ("mamba", "retnet")
    assert loaded.origins["training.batch_size"] == "command line"
    assert loaded.origins["model.layer_pattern"] == "command line"
    assert loaded.origins["training.seed"] == "file"
    assert loaded.origins["model.dropout"] == "default"
    assert set(loaded.origins) >= {f"training.{name}" for name in type(config.training).model_fields}


@pytest.mark.parametrize("item", ["training.batch_size", "=4", "training..x=1", "training.seed.x=1"])
def test_malformed_override_is_a_config_error(tmp_path, item):
    assert "--set" in problems(tmp_path, SMALL + "training: {seed: 3}\n", item) or item == "training.seed.x=1"


def test_override_of_a_field_that_does_not_exist(tmp_path):
    assert "training.batch_sise: unknown field; did you mean 'batch_size'?" in problems(
        tmp_path, "", "training.batch_sise=4"
    )


def test_missing_file_and_unknown_preset(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UnknownNameError, match="did you mean 'embbert'"):
        load_config("embert")
    assert load_config("embbert").name == "embbert"


def test_resolved_config_round_trips_through_yaml(tmp_path):
    first = load_config("mini").config
    again = load_config(write(tmp_path, first.to_yaml())).config
    assert again == first
    assert config_from_dict(json.loads(json.dumps(first.to_dict())), "checkpoint") == first


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().model.hidden_size = 3


def test_block_options_reach_the_block():
    model = ModelConfig(hidden_size=32, layer_pattern=["mamba"], block_options={"mamba": {"d_state": 4}})
    options = block_config(registry().block("mixer", "mamba"), model)
    assert (options.hidden_size, options.d_state) == (32, 4)


def test_schema_lists_blocks_options_and_fields():
    schema = json_schema()
    model = schema["definitions"]["ModelConfig"]["properties"]
    names, *uses = model["layer_pattern"]["items"]["anyOf"]
    assert set(names["enum"]) == {use["properties"]["block"]["const"] for use in uses} == set(registry().mixers())
    assert set(model["norm_type"]["enum"]) == set(registry().blocks("norm"))
    assert "d_state" in model["block_options"]["properties"]["mamba"]["properties"]
    assert "hidden_size" not in model["block_options"]["properties"]["mamba"]["properties"]
    assert schema["definitions"]["TrainingConfig"]["properties"]["batch_size"]["default"] == 32
    assert schema["$schema"].endswith("draft-07/schema#")
    for field in (*ModelConfig.model_fields, *type(Config().training).model_fields):
        parts = {**model, **schema["definitions"]["TrainingConfig"]["properties"]}
        assert parts[field].get("description"), field


def test_the_schema_that_the_presets_name_is_the_current_one():
    path = registry().preset("embbert").parent / "ultrazoo.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json_schema(), "run: ultrazoo schema --output " + str(path)

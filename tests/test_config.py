"""The config: names, errors, overrides, origins, and values that cannot act."""

import json

import pytest
import torch
from cli_parts import call

from ultrazoo.config import Config, ModelConfig, block_config, config_from_dict, json_schema, load_config
from ultrazoo.errors import ConfigError, UnknownNameError
from ultrazoo.model import build_model
from ultrazoo.options import Options
from ultrazoo.plugins import Plugin
from ultrazoo.registry import Registry, registry
from ultrazoo.spec import BlockSpec

SMALL = "model: {hidden_size: 32, num_heads: 4, num_layers: 2, ffn_hidden_size: 64, vocab_size: 100}\n"


def write(tmp_path, text):
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


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


def test_values_without_effect_are_told_by_name(tmp_path):
    training = "training: {galore_rank: 8, num_epochs: 2, max_steps: 5}\n"
    text = "model: {ode_steps: 4, hope_base: 500, num_experts: 8}\n" + training
    notices = "\n".join(load_config(write(tmp_path, text)).notices)
    for field in (
        "model.ode_steps",
        "model.hope_base",
        "model.num_experts",
        "training.galore_rank",
        "training.num_epochs",
    ):
        assert field in notices
    assert "model.ode_steps: has no effect without one of: ode" in notices
    assert load_config(write(tmp_path, SMALL)).notices == []


@pytest.mark.parametrize(
    ("fields", "notice"),
    [
        ({"use_hope": True}, "model.use_hope: has no effect: no block of layer_pattern ['standard_attn'] reads it"),
        (
            {"use_bitnet": True, "ffn_type": "none", "layer_pattern": ["plain"]},
            "model.use_bitnet: has no effect: no block of layer_pattern ['plain'] reads it, only: ",
        ),
        ({"use_embedding_conv": True}, "model.use_embedding_conv: has no effect while use_factorized_embedding is"),
        (
            {"position_embedding": "rope", "layer_pattern": ["mamba"]},
            "model.position_embedding: 'rope' has no effect: no block of layer_pattern ['mamba'] rotates",
        ),
        ({"block_options": {"mamba": {"d_state": 8}}}, "model.block_options.mamba: has no effect: no layer uses"),
    ],
)
def test_a_setting_without_effect_is_a_notice_and_changes_no_parameter(monkeypatch, fields, notice):
    plain = BlockSpec(name="plain", kind="mixer", module=Plain, config=Options, paper="", equation="y = x")
    zoo = Registry([*registry().plugins, Plugin(name="p", distribution="p", version="1", module="p", blocks=(plain,))])
    for module in ("ultrazoo.model", "ultrazoo.config.model"):
        monkeypatch.setattr(f"{module}.registry", lambda: zoo)
    small = {"hidden_size": 48, "vocab_size": 100, "num_layers": 1, "num_heads": 4}
    idle = ModelConfig.model_validate(small | fields)
    assert [line for line in idle.notices() if line.startswith(notice)], idle.notices()
    setting = next(iter(fields))
    default = ModelConfig.model_fields[setting].get_default(call_default_factory=True)
    off = ModelConfig.model_validate(small | fields | {setting: default})
    assert [name for name, _ in build_model(idle).named_parameters()] == [
        name for name, _ in build_model(off).named_parameters()
    ]
    assert not any(line.startswith(notice) for line in off.notices())


class Plain(torch.nn.Identity):
    def forward(self, x, segments=None):
        return x


REFERENCE_SAMPLE = """\
model_class: MODEL_CLASS
model:
  vocab_size: 50000
  hidden_size: 768
  num_layers: 12
  num_loops: 1
  num_heads: 12
  retention_heads: 12
  num_experts: 4
  top_k_experts: 2
  dropout: 0.1
  layer_pattern: [standard_attn]
  ode_solver: rk4
  ode_steps: 2
  use_bitnet: false
  norm_type: NORM
  use_factorized_embedding: false
  factorized_embedding_dim: 128
  use_embedding_conv: false
  embedding_conv_kernel: 3
  hope_base: 10000.0
  hope_damping: 0.01
  use_hope: true
  use_moe: true
  ffn_hidden_size: 3072
  ffn_activation: ACTIVATION
training:
  batch_size: 4
  dataloader_workers: 2
  max_length: 512
  mlm_probability: 0.15
  max_samples: 20000000
  dataset_batch_size: 25000
  num_workers: 8
  cache_dir: "./temp_data/v2_dataset_cache"
  local_parquet_dir: "/path/to/parquet"
  prefer_local_cache: true
  stream_local_parquet: true
  use_amp: false
  gradient_accumulation_steps: 4
  checkpoint_every_n_steps: 500
  max_rolling_checkpoints: 3
  num_best_checkpoints: 2
  nan_check_interval: 10
  log_gradient_stats: true
  gradient_log_interval: 10
  use_galore: false
  galore_rank: 64
  galore_update_interval: 1
  galore_scale: 1.0
  galore_max_dim: 4096
"""
"""The sample of the original project's config reference, with its three choices open."""


@pytest.mark.parametrize("model_class", ["frankenstein", "mini"])
@pytest.mark.parametrize("norm", ["layer_norm", "dynamic_tanh", "derf"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_sample_of_the_config_reference_loads(tmp_path, capsys, model_class, norm, activation):
    text = REFERENCE_SAMPLE
    for name, value in {"MODEL_CLASS": model_class, "NORM": norm, "ACTIVATION": activation}.items():
        text = text.replace(name, value)
    path = write(tmp_path, text)
    assert call("train", str(path), "--print-config") == 0
    printed = capsys.readouterr()
    assert "note: model.use_hope: has no effect" in printed.err
    resolved = load_config(write(tmp_path, printed.out)).config.model
    assert (resolved.norm_type, resolved.ffn_activation, resolved.use_hope) == (norm, activation, True)
    assert resolved.use_factorized_embedding == (model_class == "mini")


@pytest.mark.parametrize("mixer", sorted(registry().mixers()))
@pytest.mark.parametrize("preset", sorted(registry().presets()))
def test_every_preset_runs_with_every_mixer(preset, mixer):
    config = load_config(preset, [f"model.layer_pattern=[{mixer}]", "model.retention_heads=4"]).config
    with torch.device("meta"):
        assert {layer.mixer_name for layer in build_model(config.model).layers} == {mixer}


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
